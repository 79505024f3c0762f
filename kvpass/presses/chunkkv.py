"""Neighbours belong together: keep or drop whole chunks. https://arxiv.org/abs/2502.00299"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvpass.budget import Prompt
from kvpass.errors import PressError
from kvpass.press import Press, ScorerPress, SelectingPress, Wrapper
from kvpass.press_inputs import PressInputs
from kvpass.presses.nesting import expect_scorer
from kvpass.registry import register_press
from kvpass.selection import best


@register_press("chunkkv")
@dataclass(frozen=True)
class ChunkKV(Wrapper, SelectingPress):
    """Keeps whole chunks of `chunk_length` neighbours, the same ones in all heads of a layer.

    A chunk is worth the mean over its tokens of the inner score, summed over the heads; the rest of the text is a
    chunk too. The share of chunks is exact, the number of tokens differs by a chunk where the rest is kept.
    """

    changes = "drops pairs, layers and rows differ by less than a chunk"

    chunk_length: int = 20

    def __post_init__(self) -> None:
        expect_scorer(self.name, self.press, "a chunk is worth the mean of its scores")
        if self.chunk_length < 1:
            raise PressError(f"chunkkv: chunk_length={self.chunk_length}, expected at least 1")

    @property
    def exact(self) -> bool:
        return False

    @property
    def min_tokens(self) -> int:
        return max(self.press.min_tokens, self.chunk_length + 1)

    def fits(self, prompt: Prompt) -> bool:
        return prompt.tokens != self.chunk_length and self.press.fits(prompt)

    def for_prompt(self, prompt: Prompt) -> Press:
        """Without a whole chunk there is nothing but the inner press."""
        return self.press.for_prompt(prompt) if prompt.tokens < self.chunk_length else super().for_prompt(prompt)

    def sizes(self, prompt: Prompt) -> dict[str, int]:
        chunks = -(-prompt.tokens // self.chunk_length)
        if prompt.budget.target_size is not None:
            kept = max(1, prompt.kept // self.chunk_length)
        else:
            kept = max(1, int(chunks * (1 - prompt.ratio)))
        inner = {f"inner_{name}": size for name, size in self.press.sizes(prompt).items()}
        return {"budget": min(prompt.tokens, kept * self.chunk_length), "chunks": kept, **inner}

    def smallest(self) -> dict[str, int]:
        return {f"inner_{name}": low for name, low in self.press.smallest().items()}

    def keep(self, x: PressInputs) -> Tensor:
        assert isinstance(self.press, ScorerPress)
        scores = self.press.score(x.part("inner_").replace(scalars=x.scalars)).sum(dim=1)  # [B, S]
        tokens = scores.shape[1]
        whole = (tokens - 1) // self.chunk_length  # a rest of 1 to chunk_length tokens is left
        chunks = scores[:, : whole * self.chunk_length].unflatten(1, (whole, self.chunk_length)).mean(dim=-1)
        rest = scores[:, whole * self.chunk_length :].mean(dim=-1, keepdim=True)
        chosen = best(torch.cat([chunks, rest], dim=1), x.size("chunks"))
        chunk = torch.arange(tokens, device=scores.device) // self.chunk_length
        return chosen.index_select(1, chunk)[:, None].expand(-1, x.keys.shape[1], -1)
