"""Keep what the last token attends to, the same positions in all heads. https://arxiv.org/abs/2401.06104"""

from dataclasses import dataclass

from torch import Tensor

from kvpass.press import ScorerPress
from kvpass.press_inputs import PressInputs
from kvpass.presses.window_attention import protect_window, window_attention
from kvpass.registry import register_press


@register_press("tova")
@dataclass(frozen=True)
class TOVA(ScorerPress):
    """Keeps what the last token attends to, the same positions in all heads.

    The score is the attention of the last query, averaged over all query heads; the last token itself is kept.
    """

    def score(self, x: PressInputs) -> Tensor:
        attention = window_attention(x, 1).flatten(1, 3).mean(dim=1, keepdim=True)  # [B, 1, S - 1]
        return protect_window(x, attention.expand(-1, x.keys.shape[1], -1), 1)
