"""The baseline: keep pairs at random."""

from dataclasses import dataclass

from torch import Tensor

from kvpass.press import ScorerPress
from kvpass.press_inputs import PressInputs
from kvpass.presses.noise import uniform
from kvpass.registry import register_press


@register_press("random")
@dataclass(frozen=True)
class Random(ScorerPress):
    """Keeps pairs at random.

    Scores are a hash of seed, layer, head and position: the same on every backend and device, and for every row, so
    that what a text keeps does not depend on its neighbours in the batch.
    """

    seed: int = 0

    def score(self, x: PressInputs) -> Tensor:
        return uniform(x, x.keys.shape[2], self.seed).expand(x.keys.shape[:3])
