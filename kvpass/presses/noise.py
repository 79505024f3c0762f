"""Random numbers that are a function of seed, layer, head and place: the same on every backend, device and batch."""

import math

import torch
from torch import Tensor

from kvpass.press_inputs import PressInputs

MODULUS = 2**24  # whole numbers below it are exact in float32


def uniform(x: PressInputs, count: int, seed: int) -> Tensor:
    """Whole numbers from 0 to 2**24 - 1, evenly distributed, other ones in every layer and head. f32[Hkv, count]"""
    device, heads = x.keys.device, x.keys.shape[1]
    head = torch.arange(heads, device=device)[:, None]
    state = torch.arange(count, device=device) + head * 0x51ED27
    state = state + (seed * 0x1B873B + x.layer * 0x6C078F) % MODULUS
    for factor in (0x2C1B3D, 0x5F356B, 0x1B56C5):  # odd factors and shifts: a bijection that scatters its input
        state = state * factor % MODULUS
        state = state ^ (state >> 11)
    return state.to(torch.float32)


def normal(x: PressInputs, rows: int, columns: int, seed: int) -> Tensor:
    """Standard normal numbers, other ones in every layer and head (Box and Muller). f32[Hkv, rows, columns]"""
    count = rows * columns
    first, second = uniform(x, 2 * count, seed).unflatten(1, (2, count)).unbind(1)
    radius = torch.sqrt(-2 * torch.log((first + 1) / MODULUS))
    numbers: Tensor = (radius * torch.cos(second * (2 * math.pi / MODULUS))).unflatten(1, (rows, columns))
    return numbers
