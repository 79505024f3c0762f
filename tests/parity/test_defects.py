"""Where kvpress 0.5.5 is wrong, kvpass against the formula instead, written out in ``eager.py``."""

from __future__ import annotations

from typing import Any

import eager
import pytest
import torch
from comparing import assert_close, compare_kept
from reference import captured, model_of
from torch import Tensor

import kvpass
from kvpass.errors import PressError
from kvpass.press_inputs import PressInputs
from kvpass.presses import (
    Block,
    Chunk,
    ChunkKV,
    Composed,
    CriticalKV,
    EntropyGatedChunkKV,
    ExpectedAttention,
    Finch,
    KeyRerotation,
    Knorm,
    LagKV,
    ObservedAttention,
    SimLayerKV,
    SnapKV,
)

WINDOW = 8


def context(batch: int, length: int, seed: int = 5) -> Tensor:
    """Tokens; none occurs twice in a row of up to 250."""
    generator = torch.Generator().manual_seed(seed)
    if length > 250:
        return torch.randint(3, 256, (batch, length), generator=generator)
    return torch.stack([torch.randperm(253, generator=generator)[:length] + 3 for _ in range(batch)])


def prefilled(
    press: Any, ids: Tensor, ratio: float | None = 0.5, arch: str = "llama", dtype: str = "float32", **options: Any
) -> tuple[Any, list[eager.Layer]]:
    """The cache that kvpass leaves, and what the layers of the model computed."""
    key = (arch, dtype, 0)
    model = kvpass.compile(captured(key), press=press, ratio=ratio, backend="eager")
    return model.prefill(ids, **options).past_key_values, eager.layers_of(model_of(key), ids)


@pytest.mark.parametrize("length", [120, 131], ids=["rest scored", "rest kept whole"])
def test_chunk_of_snapkv(length: int) -> None:
    """kvpress turns the queries of every chunk by the rotation of the prompt's last tokens, and stops at a short rest.

    A chunk is a text of its own: the queries are those that the model computed for its last tokens.
    """
    size, ids = 32, context(2, length)
    cache, layers = prefilled(Chunk(SnapKV(WINDOW), size), ids)
    for number, layer in enumerate(layers):
        rows = []
        for queries, keys in zip(layer.queries, layer.keys, strict=True):
            parts = []
            for start in range(0, length, size):
                part = slice(start, min(start + size, length))
                count = part.stop - part.start
                if count <= WINDOW:
                    parts.append(torch.arange(start, length).expand(keys.shape[0], -1))
                else:
                    scores = eager.snapkv(queries[:, part], keys[:, part], WINDOW)
                    parts.append(eager.top(scores, max(1, int(count * 0.5))) + start)
            rows.append(torch.cat(parts, -1))
        assert torch.equal(cache.positions(number), torch.stack(rows))


def test_chunk_of_expected_attention() -> None:
    """kvpress counts the future positions from the length of the chunk, as if nothing followed it.

    The queries to come stand behind the whole prompt.
    """
    size, length, future = 40, 115, 64
    ids = context(1, length)
    cache, layers = prefilled(Chunk(ExpectedAttention(n_future_positions=future), size), ids)
    for number, layer in enumerate(layers):
        parts = []
        for start in range(0, length, size):
            part = slice(start, min(start + size, length))
            scores = eager.expected_attention(layer, 0, part, future)
            parts.append(eager.top(scores, max(1, int((part.stop - start) * 0.5))) + start)
        assert torch.equal(cache.positions(number), torch.cat(parts, -1)[None])


def test_block_of_snapkv() -> None:
    """kvpress gathers hidden states by pieces of their width, so that rows mix the tokens of several heads, and turns
    queries by the rotation of the prompt's end; candidates come in score order.

    A candidate keeps its own query and its place among the others.
    """
    length, block, ratio = 101, 24, 0.6
    ids = context(1, length)
    cache, layers = prefilled(Block(SnapKV(WINDOW), block), ids, ratio)
    for number, layer in enumerate(layers):
        queries, keys = layer.queries[0].unflatten(0, (layer.keys.shape[1], -1)), layer.keys[0]

        def score(candidates: Tensor, head: int, q: Tensor = queries, k: Tensor = keys) -> Tensor:
            return eager.snapkv(q[head][:, candidates], k[head, candidates][None], WINDOW)[0]

        expected = eager.blockwise(score, int(length * (1 - ratio)), length, block, keys.shape[0])
        assert torch.equal(cache.positions(number), expected[None])


def test_block_of_lagkv() -> None:
    """kvpress hands candidates on in score order, but partitions of neighbours are what lagkv compares."""
    length, block, lag = 131, 24, 16
    ids = context(1, length)
    cache, layers = prefilled(Block(LagKV(lag_size=lag, cross_scoring=True), block), ids)
    for number, layer in enumerate(layers):

        def score(candidates: Tensor, head: int, layer: eager.Layer = layer) -> Tensor:
            keys, values = (x[0, head, candidates][None] for x in (layer.keys, layer.values))
            return eager.lagkv(keys, values, lag)[0]

        expected = eager.blockwise(score, int(length * 0.5), length, block, layer.keys.shape[1])
        assert torch.equal(cache.positions(number), expected[None])


def test_lagkv_with_a_constant_channel() -> None:
    """kvpress divides by the range of the channel: all scores of the partition are NaN."""
    generator = torch.Generator().manual_seed(1)
    keys, values = torch.randn(2, 2, 3, 100, 8, generator=generator).unbind()
    keys[..., 3] = 0.25
    x = PressInputs({"keys": keys, "values": values}, sizes={"budget": 50})
    scores = LagKV(lag_size=16, cross_scoring=True).score(x)
    for row in range(2):
        assert_close(scores[row], eager.lagkv(keys[row], values[row], 16), 1e-6, "scores")


@pytest.mark.parametrize("arch", ["qwen2", "phi3"])
def test_criticalkv_without_head_dim(arch: str) -> None:
    """kvpress reads config.head_dim, which these configs do not have."""
    length, epsilon = 97, 1e-4
    ids = context(2, length)
    cache, layers = prefilled(CriticalKV(SnapKV(WINDOW), epsilon=epsilon), ids, 0.6, arch)
    count, first = int(length * (1 - 0.6)), int((1 - 0.6) * length * 0.5)
    for number, layer in enumerate(layers):
        scores = torch.stack([eager.snapkv(q, k, WINDOW) for q, k in zip(layer.queries, layer.keys, strict=True)])
        weighted = (scores + epsilon) * eager.projected_norm(layer)
        weighted.scatter_(2, eager.top(scores, first), float("inf"))
        assert torch.equal(cache.positions(number), eager.top(weighted, count))


def test_observed_attention_in_bfloat16() -> None:
    """kvpress rounds the number of queries that can see a key to bfloat16: 300, 299, 298 become 300, 300, 298."""
    length, count, ids = 331, 130, context(1, 331)
    cache, layers = prefilled(ObservedAttention(), ids, 0.607, dtype="bfloat16")
    layer, seen_by = layers[0], length - torch.arange(length)
    keys = layer.keys.repeat_interleave(layer.groups, 1)
    logits = (layer.queries @ keys.transpose(-1, -2)).float() / keys.shape[-1] ** 0.5
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    received = logits.masked_fill(~causal, float("-inf")).softmax(-1).sum(2)
    scores, rounded = (
        (received / divisor).unflatten(1, (-1, layer.groups)).mean(2)
        for divisor in (seen_by, seen_by.to(torch.bfloat16).float())
    )
    kept = eager.top(scores, count)
    assert not torch.equal(kept, eager.top(rounded, count)), "the divisor decides nothing here"
    assert compare_kept(cache.positions(0), kept, scores, ties=1e-5) == 0


def test_snapkv_behind_another_press() -> None:
    """kvpress shows the second press tokens in the score order of the first; its window and its smoothing over
    neighbours are then over tokens that happen to stand there.

    What is left keeps its place: the window is the prompt's last tokens, as far as they are left.
    """
    length, ids = 113, context(2, 113)
    cache, layers = prefilled(Composed((Knorm(), SnapKV(WINDOW)), ratios=(0.3, 0.5)), ids, None)
    for number, layer in enumerate(layers):
        count = int(length * (1 - 0.3))
        left = eager.top(-layer.keys.norm(dim=-1), count)  # [B, Hkv, n]
        queries = layer.queries[:, :, -WINDOW:].unflatten(1, (left.shape[1], -1))
        expected = torch.empty(*left.shape[:2], int(count * 0.5), dtype=torch.int64)
        for row, head in [(r, h) for r in range(left.shape[0]) for h in range(left.shape[1])]:
            positions = left[row, head]
            keys = layer.keys[row, head, positions]
            scores = eager.window_scores(queries[row, head], keys, WINDOW, 5, positions, length - 1)
            expected[row, head] = positions[eager.top(scores, expected.shape[-1])]
        assert torch.equal(cache.positions(number), expected)


def test_rerotation_on_gemma3() -> None:
    """kvpress stops: Gemma3's rotary module has frequencies for every kind of layer.

    Kept keys stand at 0..N-1, those of sliding layers, which keep all, end there as well.
    """
    length, ids = 61, context(1, 61)
    cache, layers = prefilled(KeyRerotation(Knorm()), ids, 0.5, "gemma3_text")
    count, model = int(length * 0.5), model_of(("gemma3_text", "float32", 0))
    kinds = model.config.layer_types
    assert {"full_attention", "sliding_attention"} == set(kinds)
    for number, (layer, kind) in enumerate(zip(layers, kinds, strict=True)):
        left = torch.arange(length).expand(1, layer.keys.shape[1], -1)
        if kind == "full_attention":
            left = eager.top(-layer.keys.norm(dim=-1), count)
        held = cache.positions(number)
        if kind == "full_attention":
            assert torch.equal(held, left)
        first = count - left.shape[-1]
        plain = layer.plain_keys.gather(2, left[..., None].expand(-1, -1, -1, layer.keys.shape[-1]))
        expected = eager.turned(plain, *layer.frequencies(torch.arange(first, count)))
        assert_close(cache.keys(number), expected[:, :, -cache.kept(number) :], 1e-5, f"keys of layer {number}")


ROW_BY_ROW = {
    "chunkkv": (ChunkKV(Knorm(), 7), 0.5, {}),
    "entropy_gated_chunkkv": (EntropyGatedChunkKV(SnapKV(WINDOW)), 0.5, {}),
    "simlayerkv": (SimLayerKV(lazy_threshold=0.435, n_last=2, n_recent=40, n_initial=3), None, {}),
    "finch": (Finch(), 0.5, {"question_tokens": 9}),
}


@pytest.mark.parametrize("name", ROW_BY_ROW)
def test_rows_decide_for_themselves(name: str) -> None:
    """kvpress takes the first row's choice for all (chunkkv), decides for the whole batch (simlayerkv) or refuses it.

    Against kvpress the rows are compared one by one in ``test_more.py``; here, that a batch is its rows.
    """
    press, ratio, options = ROW_BY_ROW[name]
    ids = context(3, 113)
    both, _ = prefilled(press, ids, ratio, **options)
    lengths = set()
    for row in range(3):
        alone, _ = prefilled(press, ids[row : row + 1], ratio, **options)
        for layer in range(2):
            expected = alone.positions(layer)[0]
            expected = expected[:, (expected >= 0).all(0)]
            ours = both.positions(layer)[row]
            assert torch.equal(ours[:, : expected.shape[1]], expected)
            assert bool((ours[:, expected.shape[1] :] == -1).all())
            lengths.add(expected.shape[1])
    assert len(lengths) > 1 or name in ("finch", "entropy_gated_chunkkv"), "all rows alike: nothing is compared"


def test_text_goes_on_behind_the_question() -> None:
    """Without re-rotation kvpress counts the delimiter, which the model never saw: the next token is one too far."""
    ids = context(1, 60)
    cache, _ = prefilled(Finch(rerotate_keys=False), ids, question_tokens=9)
    assert cache.next_position == 60


def test_no_lazy_layer_may_grow() -> None:
    """With n_recent == n_last kvpress' recent tokens are the whole text, and a lazy layer grows by the first ones."""
    with pytest.raises(PressError, match="n_recent"):
        SimLayerKV(n_last=4, n_recent=4)
