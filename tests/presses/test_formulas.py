"""Choices that random models seldom turn on, against loops written from the description."""

import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvpass.budget import Budget, Prompt
from kvpass.press import ScorerPress
from kvpass.press_inputs import PressInputs
from kvpass.presses import Chunk, ChunkKV, EntropyGatedChunkKV, Finch, PerLayer, PyramidKV
from kvpass.testing import random_inputs


@dataclass(frozen=True)
class Given(ScorerPress):
    """Scores that the test says, the same in both heads and all rows."""

    name: ClassVar[str] = "given"
    values: tuple[float, ...] = ()

    def score(self, x: PressInputs) -> Tensor:
        return torch.tensor(self.values).expand(x.keys.shape[:3])


def kept(press: object, tokens: int, ratio: float) -> list[int]:
    """What the first row keeps, the same in all heads."""
    x = random_inputs(tokens, Budget(ratio=ratio), press=press)  # type: ignore[arg-type]
    left = press.compress(x)  # type: ignore[attr-defined]
    assert torch.equal(left.kept[:, 0], left.kept[:, 1])
    count = left.kept.shape[2] if left.count is None else int(left.count[0])
    return left.kept[0, 0, :count].tolist()


def test_the_rest_of_a_text_is_a_chunk_by_its_mean() -> None:
    """By its sum a rest of three would beat a whole chunk here; by its mean it does not."""
    values = (1.0, 1, 1, 1, 9, 9, 9, 9, 2, 2, 2, 2, 3, 3, 1)  # means 1, 9, 2, 2.33
    assert kept(ChunkKV(Given(values), 4), 15, 0.5) == [4, 5, 6, 7, 12, 13, 14]
    values = (1.0, 1, 1, 1, 9, 9, 9, 9, 2.5, 2.5, 2.5, 2.5, 3, 3, 1)
    assert kept(ChunkKV(Given(values), 4), 15, 0.5) == [4, 5, 6, 7, 8, 9, 10, 11]


def greedy(scores: list[float], budget: int, length: int, low: int) -> list[int]:
    """The rule in plain words: one chunk after the other, the best first."""
    chunks = [list(range(i, min(i + length, len(scores)))) for i in range(0, len(scores), length)]
    means = [sum(scores[i] for i in chunk) / len(chunk) for chunk in chunks]
    entropies = []
    for chunk in chunks:
        values = [scores[i] - min(0.0, *(scores[j] for j in chunk), 0.0) for i in chunk]
        shares = [value / (sum(values) + 1e-8) for value in values]
        entropy = -sum(p * math.log(p + 1e-8) for p in shares)
        entropies.append(min(1.0, max(0.0, entropy / math.log(len(chunk)))) if len(chunk) > 1 else 0.0)
    mean_median, entropy_median = (sorted(v)[(len(v) - 1) // 2] for v in (means, entropies))
    taken: list[int] = []
    for c in sorted(range(len(chunks)), key=lambda c: -means[c]):
        size = min(len(chunks[c]), budget - len(taken))
        if means[c] >= mean_median and entropies[c] < entropy_median:
            size = min(size, low)
        taken += sorted(chunks[c], key=lambda i: -scores[i])[:size]
    rest = sorted(set(range(len(scores))) - set(taken), key=lambda i: -scores[i])
    return sorted(taken + rest[: budget - len(taken)])


@settings(deadline=None, max_examples=60)
@given(
    scores=st.lists(st.integers(-40, 400), min_size=11, max_size=40, unique=True),
    ratio=st.sampled_from([0.2, 0.5, 0.8]),
    length=st.integers(3, 7),
)
def test_entropy_gates_as_the_greedy_loop_does(scores: list[int], ratio: float, length: int) -> None:
    values = [score / 64 for score in scores]
    press = EntropyGatedChunkKV(Given(tuple(values)), length, 2)
    means = {round(sum(values[i : i + length]) / len(values[i : i + length]), 5) for i in range(0, len(values), length)}
    if len(means) < -(-len(values) // length):
        return  # equal chunks: which comes first is nobody's rule
    budget = max(1, int(len(values) * (1 - ratio)))
    assert kept(press, len(values), ratio) == greedy(values, budget, length, 2)


@pytest.mark.parametrize("normalize", [True, False])
def test_finch_weighs_each_query_by_what_it_can_see(normalize: bool) -> None:
    press, tokens, window = Finch(normalize_scores=normalize), 20, 8
    x = random_inputs(tokens, Budget(ratio=0.5), press=press)
    scores = press.score(x)
    for row in range(2):
        for head in range(2):
            expected = torch.zeros(tokens - window)
            for query_head in (2 * head, 2 * head + 1):
                for i in range(window):
                    last = tokens - window + i
                    logits = x.keys[row, head, : last + 1] @ x.queries[row, query_head, last] / 4
                    weight = tokens - window + i if normalize else 1
                    expected += logits.softmax(-1)[: tokens - window] * weight / (2 * window)
            torch.testing.assert_close(scores[row, head, :-window], expected)


@pytest.mark.parametrize(
    ("tokens", "ratio", "layers", "expected"),
    [
        (4096, 0.5, 4, [3994, 2697, 1399, 102]),
        (4096, 0.9, 4, [410, 410, 410, 410]),
        (1000, 0.5, 4, [936, 645, 355, 64]),
        (4096, 0.1, 4, [4032, 3802, 3571, 3341]),
        (4096, 0.25, 8, [4032, 3758, 3483, 3209, 2935, 2661, 2386, 2112]),
        (500, 0.5, 1, [436]),
    ],
)
def test_the_pyramid(tokens: int, ratio: float, layers: int, expected: list[int]) -> None:
    """Budgets that kvpress gives, total pairs per layer; one layer divides by nothing."""
    found = [PyramidKV().sizes(Prompt(tokens, Budget(ratio=ratio), i, layers))["budget"] for i in range(layers)]
    assert found == expected


def test_counts_of_chunks_and_layers() -> None:
    """kept() of every chunk and of the rest; a layer with ratio 1 keeps nothing."""
    prompt = Prompt(256, Budget(ratio=0.5), 0, 2)
    for length in (2, 4, 8, 128):
        chosen = Chunk(Given(), length).for_prompt(prompt)
        assert chosen.sizes(prompt)["budget"] == 128
    per_layer = PerLayer(Given(), (0.1, 1.0))
    assert [per_layer.sizes(Prompt(256, Budget(), i, 2))["budget"] for i in range(2)] == [230, 0]
