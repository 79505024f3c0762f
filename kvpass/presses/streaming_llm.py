"""Keep the first tokens, which attention uses as a sink, and the most recent ones. https://arxiv.org/abs/2309.17453"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvpass.errors import PressError
from kvpass.press import ScorerPress
from kvpass.press_inputs import PressInputs
from kvpass.registry import register_press


@register_press("streaming_llm")
@dataclass(frozen=True)
class StreamingLLM(ScorerPress):
    """Keeps the first `n_sink` tokens and the last N - n_sink; keys are not re-rotated."""

    n_sink: int = 4

    def __post_init__(self) -> None:
        if self.n_sink < 0:
            raise PressError(f"streaming_llm: n_sink is {self.n_sink}, expected 0 or more")

    @property
    def min_tokens(self) -> int:
        return max(2, self.n_sink + 1)

    def score(self, x: PressInputs) -> Tensor:
        batch, heads, tokens, _ = x.keys.shape
        position = torch.arange(tokens, device=x.keys.device)
        dropped = (position >= self.n_sink) & (position < self.n_sink + tokens - x.budget)
        return (~dropped).to(x.keys.dtype).expand(batch, heads, tokens)
