"""The last queries of the prompt know what will be asked: keep what they attend to. https://arxiv.org/abs/2404.14469"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvpass.errors import PressError
from kvpass.press import PressInputs, ScorerPress, protect, register_press
from kvpass.presses.window_attention import window_attention


@register_press("snapkv")
@dataclass(frozen=True)
class SnapKV(ScorerPress):
    """Keeps what the last queries of the prompt attend to.

    The score is the mean attention of the last `window_size` queries, smoothed over `kernel_size`
    neighbours; the window is kept.
    """

    window_size: int = 64
    kernel_size: int = 5

    def __post_init__(self) -> None:
        if self.window_size < 1 or self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise PressError(
                f"snapkv: window_size={self.window_size}, kernel_size={self.kernel_size}; expected a window of at "
                "least 1 and an odd kernel"
            )

    @property
    def min_tokens(self) -> int:
        return self.window_size + 1

    def score(self, x: PressInputs) -> Tensor:
        attention = window_attention(x, self.window_size).mean(dim=-2)  # [B, Hkv, G, S - window]
        return protect(self._smooth(attention).mean(dim=2), after=self.window_size)

    def _smooth(self, attention: Tensor) -> Tensor:
        """Moving average with zeros beyond both ends, zeros counted."""
        length, half = attention.shape[-1], self.kernel_size // 2
        zeros = torch.zeros_like(attention[..., :1]).expand(*attention.shape[:-1], half)
        padded = torch.cat([zeros, attention, zeros], dim=-1).to(torch.float32)
        total = padded[..., :length]
        for shift in range(1, self.kernel_size):
            total = total + padded[..., shift : shift + length]
        return (total / self.kernel_size).to(attention.dtype)
