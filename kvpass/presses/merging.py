"""What is evicted leaves its value to its most similar survivor. After https://arxiv.org/abs/2210.09461"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from kvpass.budget import Prompt
from kvpass.errors import PressError
from kvpass.loops import while_loop
from kvpass.press import Compressed, ScorerPress, Wrapper
from kvpass.press_inputs import PressInputs
from kvpass.presses.nesting import expect_scorer
from kvpass.registry import register_press
from kvpass.selection import compact, gather

ROWS = 256  # evicted keys that are compared at once


@register_press("merging")
@dataclass(frozen=True)
class Merging(Wrapper):
    """Keeps what the inner press keeps, with the values of evicted pairs blended into it.

    An evicted value goes to the kept key that is most similar to its own, weighted by that similarity and by the
    norms of the two values, if the similarity is at least `similarity_threshold` and among the greatest
    `merge_fraction` of the head. Keys stay. Extra memory: 4 * B * Hkv * 256 * N bytes, in a loop inside the graph.
    """

    changes = "drops pairs, merges their values into others"

    similarity_threshold: float = 0.0
    merge_fraction: float = 1.0

    def __post_init__(self) -> None:
        expect_scorer(self.name, self.press, "what it evicts must have a value to leave")
        if not 0 <= self.similarity_threshold <= 1 or not 0 < self.merge_fraction <= 1:
            raise PressError(
                f"merging: similarity_threshold={self.similarity_threshold}, merge_fraction={self.merge_fraction}; "
                "expected 0 <= threshold <= 1 and 0 < fraction <= 1"
            )

    def fits(self, prompt: Prompt) -> bool:
        return super().fits(prompt) and prompt.kept < prompt.tokens

    def compress(self, x: PressInputs) -> Compressed:
        assert isinstance(self.press, ScorerPress)
        left = self.press.compress(x)
        assert left.kept is not None
        dropped = torch.ones_like(x.keys[..., 0], dtype=torch.bool).scatter(2, left.kept, False)
        evicted = compact(dropped, x.keys.shape[2] - left.kept.shape[2])
        similarity, target = _nearest(gather(x.keys, evicted), left.keys)
        accepted = self._accepted(similarity)
        own, theirs = gather(x.values, evicted).to(torch.float32), left.values.to(torch.float32)
        norm = torch.linalg.vector_norm(own, dim=-1)
        target_norm = torch.linalg.vector_norm(theirs, dim=-1).gather(2, target)
        weight = similarity.clamp(min=0) * accepted * norm / (norm + target_norm + 1e-6)  # [B, Hkv, S - N]
        where = target[..., None].expand_as(own)
        total = torch.zeros_like(theirs[..., 0]).scatter_add(2, target, weight)[..., None]
        merged = (theirs.scatter_add(2, where, weight[..., None] * own)) / (1 + total)
        return replace(left, values=torch.where(total > 0, merged.to(left.values.dtype), left.values))

    def _accepted(self, similarity: Tensor) -> Tensor:
        accepted = similarity >= self.similarity_threshold
        if self.merge_fraction == 1:
            return accepted
        ascending = similarity.masked_fill(~accepted, float("-inf")).sort(dim=-1).values
        last = torch.arange(similarity.shape[-1], device=similarity.device)[-1]
        rank = last.to(torch.float32) * (1 - self.merge_fraction)
        low, high = (ascending.index_select(-1, r.to(torch.int64)[None]) for r in (rank.floor(), rank.ceil()))
        limit = torch.where(low == high, high, low + (high - low) * (rank - rank.floor()))
        return accepted & (similarity >= limit)


def _nearest(evicted: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine similarity to the most similar kept key, and which one that is. f32 and i64[B, Hkv, S - N]"""
    evicted, kept = (F.normalize(states.to(torch.float32), dim=-1, eps=1e-6) for states in (evicted, kept))
    batch, heads, count, _ = evicted.shape

    def unfinished(start: Tensor, similarity: Tensor, target: Tensor) -> Tensor:
        return start < count

    def next_rows(start: Tensor, similarity: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = (torch.arange(ROWS, device=kept.device) + start).clamp(max=count - 1)
        most = (evicted.index_select(2, rows) @ kept.transpose(-1, -2)).max(dim=-1)
        where = rows.expand(batch, heads, ROWS)
        return start + ROWS, similarity.scatter(2, where, most.values), target.scatter(2, where, most.indices)

    first = torch.zeros((), dtype=torch.int64, device=kept.device)
    similarity = torch.zeros(batch, heads, count, device=kept.device)
    target = torch.zeros(batch, heads, count, dtype=torch.int64, device=kept.device)
    _, similarity, target = while_loop(unfinished, next_rows, (first, similarity, target))
    return similarity, target
