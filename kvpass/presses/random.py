"""The baseline: keep pairs at random."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvpass.press import PressInputs, ScorerPress, register_press

MODULUS = 2**24  # whole numbers below it are exact in float32


@register_press("random")
@dataclass(frozen=True)
class Random(ScorerPress):
    """Keeps pairs at random.

    Scores are a hash of seed, layer, row, head and position: the same on every backend and device.
    """

    seed: int = 0

    def score(self, x: PressInputs) -> Tensor:
        batch, heads, tokens, _ = x.keys.shape
        device = x.keys.device
        row = torch.arange(batch, device=device)[:, None, None]
        head = torch.arange(heads, device=device)[:, None]
        state = torch.arange(tokens, device=device) + head * 0x51ED27 + row * 0x2545F5
        state = state + (self.seed * 0x1B873B + x.layer * 0x6C078F) % MODULUS
        for factor in (
            0x2C1B3D,
            0x5F356B,
            0x1B56C5,
        ):  # odd factors and shifts: a bijection that scatters its input
            state = state * factor % MODULUS
            state = state ^ (state >> 11)
        return state.to(torch.float32)
