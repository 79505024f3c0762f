"""The last queries of the prompt know what will be asked: keep what they attend to. https://arxiv.org/abs/2404.14469"""

from dataclasses import dataclass

from torch import Tensor

from kvpass.errors import PressError
from kvpass.press import ScorerPress
from kvpass.press_inputs import PressInputs
from kvpass.presses.window_attention import protect_window, smooth, window_attention
from kvpass.registry import register_press


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
                f"{self.name}: window_size={self.window_size}, kernel_size={self.kernel_size}; expected a window of "
                "at least 1 and an odd kernel"
            )

    @property
    def min_tokens(self) -> int:
        return self.window_size + 1

    def score(self, x: PressInputs) -> Tensor:
        attention = window_attention(x, self.window_size).mean(dim=-2)  # [B, Hkv, G, S - window]
        smoothed = smooth(attention, self.kernel_size).mean(dim=2)
        return protect_window(x, smoothed, self.window_size)
