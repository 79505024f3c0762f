"""Layers that look at the first and the last tokens alone need no others. https://arxiv.org/abs/2410.13846"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvpass.budget import Prompt
from kvpass.errors import PressError
from kvpass.press import SelectingPress
from kvpass.press_inputs import PressInputs
from kvpass.presses.window_attention import window_attention
from kvpass.registry import register_press


@register_press("simlayerkv")
@dataclass(frozen=True)
class SimLayerKV(SelectingPress):
    """Keeps all of a layer, or its first and last tokens if the last queries look at little else.

    A layer is lazy, for one row of the batch, if the last `n_last` queries give the first `n_initial` and the last
    `n_recent` tokens more than `lazy_threshold` of their attention; 1.0 finds none. It then keeps the first `n_initial`
    and the last `n_recent` tokens. The paper uses 0.9 for Llama 3, 0.65 for Llama 2, 0.8 for Mistral, 0.85 for Qwen.
    It takes no ratio: the text decides, and rows and layers differ.
    """

    changes = "drops pairs, layers and rows differ in length"

    lazy_threshold: float = 0.9
    n_last: int = 1
    n_recent: int = 1024
    n_initial: int = 4

    def __post_init__(self) -> None:
        if not 0 <= self.lazy_threshold <= 1:
            raise PressError(f"simlayerkv: lazy_threshold={self.lazy_threshold}, expected 0 to 1")
        if self.n_last < 1 or self.n_initial < 0 or self.n_recent <= self.n_last:
            raise PressError(
                f"simlayerkv: n_last={self.n_last}, n_recent={self.n_recent}, n_initial={self.n_initial}; expected "
                "1 <= n_last < n_recent and 0 <= n_initial"
            )

    @property
    def min_tokens(self) -> int:
        return self.n_initial + self.n_recent + self.n_last + 1

    @property
    def needs_budget(self) -> bool:
        return False

    @property
    def exact(self) -> bool:
        return False

    def sizes(self, prompt: Prompt) -> dict[str, int]:
        return {"budget": prompt.tokens}

    def keep(self, x: PressInputs) -> Tensor:
        tokens = x.keys.shape[2]
        position = torch.arange(tokens, device=x.keys.device)
        ends = (position < self.n_initial) | (position >= tokens - (self.n_recent - self.n_last))
        attention = window_attention(x, self.n_last)  # [B, Hkv, G, n_last, S - n_last]
        mean = attention.flatten(1, 3).mean(dim=1)
        share = mean[:, : self.n_initial].sum(dim=-1) + mean[:, -self.n_recent :].sum(dim=-1)
        lazy = (share > self.lazy_threshold)[:, None, None]  # [B, 1, 1]
        return (ends | ~lazy).expand(x.keys.shape[0], x.keys.shape[1], tokens)
