"""Batches with padding, and their rows alone."""

import torch
from models import token_ids
from torch import Tensor

import kvpass

LENGTHS = (70, 41, 41, 90)
PAD = 0


def padded(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Rows i64[n] in one batch, and its mask."""
    width = max(len(row) for row in rows)
    ids, mask = torch.full((len(rows), width), PAD), torch.zeros(len(rows), width, dtype=torch.int64)
    for index, row in enumerate(rows):
        here = slice(width - len(row), None) if side == "left" else slice(0, len(row))
        ids[index, here], mask[index, here] = row, 1
    return ids, mask


def texts(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[Tensor]:
    return [token_ids(1, n, seed=seed + i)[0] for i, n in enumerate(lengths)]


def entries(cache: kvpass.CompressedCache, layer: int, row: int) -> tuple[Tensor, Tensor, Tensor]:
    """Positions, keys and values that one row holds."""
    positions = cache.positions(layer)[row]
    held = positions[0] >= 0
    return positions[:, held], cache.keys(layer)[row][:, held], cache.values(layer)[row][:, held]


def close(found: Tensor, expected: Tensor) -> None:
    if not found.is_floating_point():
        assert torch.equal(found, expected)
    else:
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
