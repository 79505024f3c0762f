"""Statistical leverage of the keys, sketched. https://arxiv.org/abs/2507.08143"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvpass.errors import PressError
from kvpass.press import ScorerPress
from kvpass.press_inputs import PressInputs
from kvpass.presses.noise import normal
from kvpass.registry import register_press

JITTERS = (0.01, 0.1, 1.0, 10.0, 100.0)  # added to the diagonal; the first that makes it definite is taken


@register_press("leverage")
@dataclass(frozen=True)
class Leverage(ScorerPress):
    """Keeps keys that the other keys do not explain.

    The score is the leverage of the key before RoPE, less the mean key, in `sketch_dimension` random directions
    drawn from `seed`; standardised over all heads and positions of a row.
    """

    sketch_dimension: int = 48
    seed: int = 0

    def __post_init__(self) -> None:
        if self.sketch_dimension < 1:
            raise PressError(f"leverage: sketch_dimension={self.sketch_dimension}, expected at least 1")

    def score(self, x: PressInputs) -> Tensor:
        keys, size = x.keys_pre_rope, self.sketch_dimension
        sketch = normal(x, int(keys.shape[3]), size, self.seed) / size**0.5
        centred = keys - keys.mean(dim=2, keepdim=True)
        rows = (centred @ sketch.to(keys.dtype)).to(torch.float32)  # [B, Hkv, S, k]
        gram = rows.transpose(-1, -2) @ rows
        gram = (gram + gram.transpose(-1, -2)) / 2
        solved = torch.linalg.solve_triangular(_cholesky(gram), rows.transpose(-1, -2), upper=False)
        return standardised(solved.pow(2).sum(dim=-2))


def standardised(scores: Tensor) -> Tensor:
    """Mean 0 and deviation 1 over the heads and positions of a row. [B, Hkv, S]"""
    flat = scores.flatten(1, 2)
    deviation = flat.std(dim=1, keepdim=True).clamp_min(1e-6)
    result: Tensor = ((flat - flat.mean(dim=1, keepdim=True)) / deviation).unflatten(1, scores.shape[1:])
    return result


def _cholesky(gram: Tensor) -> Tensor:
    """The lower factor of gram + jitter * I with the least jitter that works, for each matrix. [B, Hkv, k, k]"""
    unit = torch.eye(int(gram.shape[-1]), device=gram.device)
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(gram + JITTERS[0] * unit)
    for jitter in JITTERS[1:]:
        other, still = torch.linalg.cholesky_ex(gram + jitter * unit)
        factor = torch.where((failed == 0)[..., None, None], factor, other)
        failed = torch.where(failed == 0, failed, still)
    return factor
