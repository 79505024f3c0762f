"""What a pair can change in the output, not only in the attention. https://arxiv.org/abs/2502.03805"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvpass.budget import Prompt
from kvpass.errors import PressError
from kvpass.press import ScorerPress, Wrapper
from kvpass.press_inputs import PressInputs
from kvpass.presses.nesting import expect_scorer
from kvpass.registry import register_press
from kvpass.selection import best


@register_press("criticalkv")
@dataclass(frozen=True)
class CriticalKV(Wrapper, ScorerPress):
    """Keeps half of the pairs by the inner score, the others by that score times what their values do to the output.

    The factor is the L1 norm of the value behind the output projection, averaged over the query heads of the KV head;
    `first_stage_ratio` of the budget is chosen by the inner score alone. A scorer itself, so it can be wrapped again.
    """

    epsilon: float = 1e-4
    first_stage_ratio: float = 0.5

    def __post_init__(self) -> None:
        expect_scorer(self.name, self.press, "its score is weighted pair by pair")
        if not 0 <= self.first_stage_ratio <= 1:
            raise PressError(f"criticalkv: first_stage_ratio={self.first_stage_ratio}, expected 0 to 1")

    def sizes(self, prompt: Prompt) -> dict[str, int]:
        if not self.first_stage_ratio:
            return self.press.sizes(prompt)
        target = prompt.budget.target_size
        kept = min(target, prompt.tokens) if target is not None else (1 - prompt.ratio) * prompt.tokens
        return {**self.press.sizes(prompt), "first_stage": max(1, int(kept * self.first_stage_ratio))}

    def score(self, x: PressInputs) -> Tensor:
        assert isinstance(self.press, ScorerPress)
        scores = self.press.score(x)
        weighted = (scores + self.epsilon) * self._projected_norm(x)
        if not self.first_stage_ratio:
            return weighted
        first = best(scores, x.size("first_stage"))
        return weighted.masked_fill(first, torch.finfo(weighted.dtype).max)

    def _projected_norm(self, x: PressInputs) -> Tensor:
        """One head at a time: extra memory B * S * D_model numbers. [B, Hkv, S]"""
        groups = x.queries.shape[1] // x.values.shape[1]
        weights = x.output_weight.unflatten(1, (x.queries.shape[1], x.values.shape[3])).unbind(1)
        norms = []
        for head, value in enumerate(x.values.unbind(1)):  # [B, S, D]
            parts = [(value @ w.T).abs().sum(dim=-1) for w in weights[head * groups : (head + 1) * groups]]
            norms.append(torch.stack(parts).mean(dim=0))
        return torch.stack(norms, dim=1)
