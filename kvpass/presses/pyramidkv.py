"""Lower layers need more pairs than higher ones: SnapKV with a budget per layer. https://arxiv.org/abs/2406.02069"""

from dataclasses import dataclass

from kvpass.budget import Prompt
from kvpass.errors import PressError
from kvpass.presses.snapkv import SnapKV
from kvpass.registry import register_press


@register_press("pyramidkv")
@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """Keeps what the last queries attend to, many pairs in the first layers and few in the last.

    Budgets fall linearly with depth and average to the ratio; the last layer has 1 / `beta` of the mean. Where the
    first layer would want more than there is, or the last one less than its window, the pyramid is cut or given up.
    """

    changes = "drops pairs, layers differ in length"

    beta: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta < 1:
            raise PressError(f"pyramidkv: beta={self.beta}, expected at least 1")

    @property
    def per_layer(self) -> bool:
        return True

    def sizes(self, prompt: Prompt) -> dict[str, int]:
        target = prompt.budget.target_size
        mean = float(min(target, prompt.tokens)) if target is not None else prompt.tokens * (1 - prompt.ratio)
        least = mean / self.beta
        most = 2 * mean - least
        if most >= prompt.tokens - self.window_size:
            most = prompt.tokens - self.window_size
            least = 2 * mean - most
        if not prompt.tokens >= most >= least >= self.window_size:
            return {"budget": max(1, round(mean))}
        step = (most - least) / (prompt.layers - 1) if prompt.layers > 1 else 0.0
        return {"budget": max(1, round(most - prompt.layer * step))}
