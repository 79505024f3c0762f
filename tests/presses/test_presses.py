"""The scores of each press: against brute force on plain tensors, and the same when inlined."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from models import captured_model
from torch import Tensor

from kvpass.errors import PressError
from kvpass.press import Press
from kvpass.press_inputs import PressInputs
from kvpass.presses import TOVA, ExpectedAttention, Knorm, Random, SnapKV, StreamingLLM
from kvpass.selection import best, compact, gather
from kvpass.testing import check_press, random_inputs

PRESSES: list[Press] = [
    Random(),
    Knorm(),
    StreamingLLM(),
    SnapKV(),
    SnapKV(window_size=16, kernel_size=3),
    TOVA(),
    ExpectedAttention(),
    ExpectedAttention(n_future_positions=64, use_covariance=False, use_vnorm=False, epsilon=0.01),
]


@pytest.mark.parametrize("press", PRESSES, ids=repr)
@pytest.mark.parametrize("arch", ["llama", "gemma3_text", "phi3"])
def test_inlined_scores_are_the_eager_ones(press: Press, arch: str) -> None:
    """At two lengths that were never the example's."""
    check_press(press, captured_model(arch))


def attention(x: PressInputs) -> Tensor:
    """All causal attention weights, [B, H, S, S]."""
    keys = x.keys.repeat_interleave(2, dim=1)
    logits = x.queries @ keys.transpose(-1, -2) / math.sqrt(16)
    mask = torch.ones(logits.shape[-2:], dtype=torch.bool).tril()
    return logits.masked_fill(~mask, float("-inf")).softmax(-1)


def test_knorm_prefers_small_keys() -> None:
    x = random_inputs(30, 10)
    torch.testing.assert_close(Knorm().score(x), -x.keys.pow(2).sum(-1).sqrt())


def test_snapkv_is_the_pooled_attention_of_the_window() -> None:
    x = random_inputs(50, 20)
    weights = attention(x)[:, :, -8:, :-8].mean(2)  # [B, H, 42]
    pooled = F.avg_pool1d(weights, 5, padding=2, stride=1).unflatten(1, (2, 2)).mean(2)
    scores = SnapKV(window_size=8).score(x)
    torch.testing.assert_close(scores[..., :-8], pooled)
    assert torch.equal(scores[..., -8:], (pooled.amax(dim=(1, 2), keepdim=True) + 1).expand(2, 2, 8))


def test_tova_is_the_attention_of_the_last_token_over_all_heads() -> None:
    x = random_inputs(50, 20)
    weights = attention(x)[:, :, -1, :-1].mean(1)
    scores = TOVA().score(x)
    torch.testing.assert_close(scores[:, 0, :-1], weights)
    assert torch.equal(scores[:, 0], scores[:, 1])


def test_expected_attention_is_the_gaussian_expectation() -> None:
    """Brute force over positions: average the rotation matrices, then exp(mean + variance / 2), normalised."""
    x = random_inputs(40, 20)
    press = ExpectedAttention(n_future_positions=24)
    rope = x.rope
    rotations = [
        rope.rotate(torch.eye(16)[None, None], rope.frequencies(torch.tensor([[40 + i]])))[0, 0] for i in range(24)
    ]
    rotation = torch.stack(rotations).mean(0)
    expected = torch.zeros(2, 4, 36)
    for row in range(2):
        for head in range(4):
            queries, keys = x.queries_pre_rope[row, head, 4:], x.keys[row, head // 2, 4:]
            mean, covariance = queries.mean(0) @ rotation, torch.cov((queries @ rotation).T, correction=0)
            logits = keys @ mean / 4 + (keys @ covariance * keys).sum(-1) / 32
            expected[row, head] = logits.softmax(-1)
    wanted = expected.unflatten(1, (2, 2)).mean(2) * x.values[:, :, 4:].norm(dim=-1)
    scores = press.score(x)
    torch.testing.assert_close(scores[..., 4:], wanted, atol=1e-6, rtol=1e-4)
    assert bool((scores[..., :4] == scores[..., 4:].amax(dim=(1, 2), keepdim=True) + 1).all())


@pytest.mark.parametrize("budget", [6, 20, 39])
def test_streaming_llm_keeps_sinks_and_the_last(budget: int) -> None:
    kept = compact(best(StreamingLLM().score(random_inputs(40, budget)), budget), budget)
    assert kept[0, 0].tolist() == [*range(4), *range(40 - budget + 4, 40)]


def test_random_scores_are_uniform_and_differ_between_layers_heads_and_seeds() -> None:
    """Rows are alike: what a text keeps does not depend on its neighbours in the batch."""
    rows = Random().score(random_inputs(4000, 10)) / 2**24
    assert torch.equal(rows[0], rows[1])
    scores = rows[:1]
    assert abs(scores.mean().item() - 0.5) < 0.01
    assert abs(scores.var().item() - 1 / 12) < 0.005
    streams = [*scores.flatten(0, 1), Random().score(random_inputs(4000, 10, layer=1))[0, 0] / 2**24]
    streams += [Random(seed=1).score(random_inputs(4000, 10))[0, 0] / 2**24]
    correlation = torch.corrcoef(torch.stack(streams)).fill_diagonal_(0)
    assert correlation.abs().max() < 0.06
    assert torch.equal(Random(seed=5).score(random_inputs(99, 10)), Random(seed=5).score(random_inputs(99, 10)))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(-3, 3), min_size=2, max_size=40), st.data())
def test_selection_is_a_stable_top_n_in_position_order(values: list[int], data: st.DataObject) -> None:
    """The N best, among equals the first, ascending: as a stable sort would have it."""
    count = data.draw(st.integers(1, len(values)))
    kept = compact(best(torch.tensor([[[float(v) for v in values]]]), count), count)[0, 0].tolist()
    expected = sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]
    assert kept == sorted(expected)


def test_gather_takes_the_kept_rows() -> None:
    states = torch.randn(2, 3, 9, 4)
    kept = torch.tensor([[[0, 4], [1, 2], [7, 8]], [[3, 5], [0, 8], [2, 6]]])
    found = gather(states, kept)
    assert torch.equal(found[1, 2], states[1, 2, [2, 6]])


@pytest.mark.parametrize("make", [lambda: SnapKV(kernel_size=4), lambda: SnapKV(window_size=0)])
def test_impossible_settings_are_refused(make: object) -> None:
    with pytest.raises(PressError, match="snapkv"):
        make()  # type: ignore[operator]
