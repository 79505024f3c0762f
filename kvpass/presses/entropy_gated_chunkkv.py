"""Chunks again, but a chunk with one peak is kept by its peak alone. After https://arxiv.org/abs/2502.00299"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvpass.budget import Prompt
from kvpass.errors import PressError
from kvpass.press import ScorerPress, SelectingPress, Wrapper
from kvpass.press_inputs import PressInputs
from kvpass.presses.nesting import expect_scorer
from kvpass.registry import register_press


@register_press("entropy_gated_chunkkv")
@dataclass(frozen=True)
class EntropyGatedChunkKV(Wrapper, SelectingPress):
    """Keeps the best chunks whole, but of good chunks with a peaked score their best tokens only.

    Chunks of `chunk_length` tokens are taken by their mean score until the budget is full. One that scores at least
    the median and whose entropy is below the median gives `low_entropy_chunk_length` tokens; what is left of the
    budget goes to the best tokens anywhere. The same positions in all heads of a layer.
    """

    chunk_length: int = 10
    low_entropy_chunk_length: int = 4

    def __post_init__(self) -> None:
        expect_scorer(self.name, self.press, "chunks are taken by the mean of their scores")
        if not self.chunk_length > self.low_entropy_chunk_length >= 1:
            raise PressError(
                f"entropy_gated_chunkkv: chunk_length={self.chunk_length}, low_entropy_chunk_length="
                f"{self.low_entropy_chunk_length}; expected chunk_length > low_entropy_chunk_length >= 1"
            )

    def keep(self, x: PressInputs) -> Tensor:
        assert isinstance(self.press, ScorerPress)
        scores = self.press.score(x).to(torch.float32).sum(dim=1)  # [B, S]
        tokens, length = scores.shape[1], self.chunk_length
        count = (tokens + length - 1) // length
        fill = scores.new_zeros(scores.shape[0], count * length - tokens)
        chunks = torch.cat([scores, fill], dim=1).unflatten(1, (count, length))  # [B, P, c]
        real = (torch.arange(count * length, device=scores.device) < tokens).unflatten(0, (count, length))
        share = self._shares(chunks, real, x.budget)  # tokens that each chunk gives
        kept = (_rank(chunks.masked_fill(~real, float("-inf"))) < share[..., None]).flatten(1, 2)[:, :tokens]
        left = x.budget - share.sum(dim=1, keepdim=True)
        kept = kept | (_rank(scores.masked_fill(kept, float("-inf"))) < left)
        return kept[:, None].expand(-1, x.keys.shape[1], -1)

    def _shares(self, chunks: Tensor, real: Tensor, budget: int) -> Tensor:
        """i64[B, P]"""
        size = real.sum(dim=-1)
        mean = (chunks * real).sum(dim=-1) / size
        entropy = _entropy(chunks, real)
        peaked = (mean >= mean.median(dim=1, keepdim=True).values) & (
            entropy < entropy.median(dim=1, keepdim=True).values
        )
        wanted = torch.where(peaked, size.clamp(max=self.low_entropy_chunk_length), size)
        order = mean.argsort(dim=1, descending=True, stable=True)
        sorted_wanted = wanted.gather(1, order)
        before = sorted_wanted.cumsum(dim=1) - sorted_wanted
        taken = torch.minimum((budget - before).clamp(min=0), sorted_wanted)
        return torch.zeros_like(taken).scatter(1, order, taken)

    def sizes(self, prompt: Prompt) -> dict[str, int]:
        return {**self.press.sizes(prompt), "budget": prompt.kept}


def _rank(scores: Tensor) -> Tensor:
    """The place of each score among those of the last axis, the greatest first."""
    return scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1, stable=True)


def _entropy(chunks: Tensor, real: Tensor) -> Tensor:
    """How evenly a chunk's score is spread over its tokens, 0 to 1. [B, P]"""
    lowest = chunks.masked_fill(~real, float("inf")).amin(dim=-1, keepdim=True).clamp(max=0)
    weight = (chunks - lowest) * real
    share = weight / (weight.sum(dim=-1, keepdim=True) + 1e-8)
    entropy = -(share * (share + 1e-8).log() * real).sum(dim=-1)
    most = real.sum(dim=-1).to(torch.float32).log()
    return torch.where(most > 0, entropy / torch.where(most > 0, most, 1), 0).clamp(0, 1)
