"""Keys with a small norm attract attention: keep those. https://arxiv.org/abs/2406.11430"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvpass.press import ScorerPress
from kvpass.press_inputs import PressInputs
from kvpass.registry import register_press


@register_press("knorm")
@dataclass(frozen=True)
class Knorm(ScorerPress):
    """Keeps keys with a small norm.

    The score is the negative L2 norm of the key, in float32 whatever the model's dtype (bf16 norms tie).
    """

    def score(self, x: PressInputs) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(x.keys, dim=-1, dtype=torch.float32)
        return -norm
