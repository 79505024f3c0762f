"""What TensorRT has no form for, or a wrong one, as plain tensor code that it takes exactly.

Exact means: the same numbers on any input, not only nearly or on what a press happens to produce.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

MOST_AT_ONCE = 3840  # of a TopK layer


def top(values: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The `most` greatest of the last axis, sorted, and where they are; a constant, of an axis that may be shorter.

    What is left over is -inf. Which of equal values comes first is not said.
    """
    padded = torch.cat([values, values.new_full((*values.shape[:-1], most), -math.inf)], dim=-1)
    found = []
    for taken in range(0, most, MOST_AT_ONCE):
        part = padded.topk(min(MOST_AT_ONCE, most - taken), dim=padded.dim() - 1)
        found.append(part)
        if taken + MOST_AT_ONCE < most:
            gone = torch.full_like(part.values, -math.inf)
            padded = padded.scatter(padded.dim() - 1, part.indices, gone)
    if len(found) == 1:
        return found[0].values, found[0].indices
    return torch.cat([part.values for part in found], dim=-1), torch.cat([part.indices for part in found], dim=-1)


def gather_rows(states: Tensor, index: Tensor) -> Tensor:
    """states [..., T, D], index i64[..., N] -> [..., N, D], as rows of one long table."""
    *outer, tokens, width = states.shape
    rows = states.reshape(-1, width).index_select(0, _flat(index, tokens))
    return rows.reshape(*outer, index.shape[-1], width)


def gather_last(values: Tensor, index: Tensor) -> Tensor:
    """values [..., T], index i64[..., N] -> [..., N], as numbers of one long list."""
    return values.reshape(-1).index_select(0, _flat(index, values.shape[-1])).reshape(index.shape)


def _flat(index: Tensor, size: int) -> Tensor:
    """Indices along the last of several axes as indices along all of them."""
    outer = index.shape[:-1]
    count = math.prod(outer)
    start = torch.arange(count, device=index.device) * size
    return (index + start.reshape(*outer, 1)).reshape(-1)


def scatter_padded(states: Tensor, index: Tensor, new: Tensor) -> Tensor:
    """Scatter along the last axis, which may be shorter than that of the index: TensorRT wants it as long."""
    padded = torch.cat([states, torch.zeros_like(new, dtype=states.dtype)], dim=-1)
    return padded.scatter(padded.dim() - 1, index, new)[..., : states.shape[-1]]


def put(states: Tensor, new: Tensor, indices: Sequence[Tensor]) -> Tensor:
    """`index_put` with indices for the first axes that broadcast, as rows of one long table."""
    axes = len(indices)
    sizes = states.shape[:axes]
    flat = indices[0]
    for size, index in zip(sizes[1:], indices[1:], strict=True):
        flat = flat * size + index
    rest = states.shape[axes:]
    rows = new.expand(*flat.shape, *rest).reshape(-1, *rest)
    where = flat.reshape(-1, *(1 for _ in rest)).expand(rows.shape)
    return states.reshape(-1, *rest).scatter(0, where, rows).reshape(states.shape)


def variance(values: Tensor, axes: Sequence[int], correction: float, keepdim: bool) -> Tensor:
    """Of its own, because that of TensorRT divides by the number of elements that the example had."""
    centred = values - values.mean(dim=list(axes), keepdim=True)
    count = math.prod(values.shape[axis] for axis in axes)
    return centred.pow(2).sum(dim=list(axes), keepdim=keepdim) / (count - int(correction))


def ranks(values: Tensor, *, descending: bool = False) -> Tensor:
    """The place of each number of the last axis in a stable sort, by comparing all pairs. i64, like values"""
    this, other = values[..., :, None], values[..., None, :]
    place = torch.arange(values.shape[-1], device=values.device)
    better = other > this if descending else other < this
    before = better | ((other == this) & (place < place[:, None]))
    return before.to(torch.int64).sum(dim=-1)


def at_rank(values: Tensor, rank: Tensor, wanted: Tensor) -> Tensor:
    """The numbers of the last axis whose ranks are `wanted` [n]."""
    here = rank[..., None, :] == wanted[:, None]
    return torch.where(here, values[..., None, :], torch.zeros_like(values)[..., None, :]).sum(dim=-1)


def order(values: Tensor, *, descending: bool = False) -> Tensor:
    """A stable argsort of the last axis."""
    place = torch.arange(values.shape[-1], device=values.device)
    return at_rank(place.expand(values.shape), ranks(values, descending=descending), place)


def sort(values: Tensor, *, descending: bool = False) -> Tensor:
    """The values of a sort of the last axis."""
    place = torch.arange(values.shape[-1], device=values.device)
    return at_rank(values, ranks(values, descending=descending), place)


def median(values: Tensor) -> Tensor:
    """The lower one of the last axis, [..., 1]"""
    middle = torch.arange(1, device=values.device) + (values.shape[-1] - 1) // 2
    return at_rank(values, ranks(values), middle)


def along(axis: int, code: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Code for the last axis, along another one."""

    def moved(*tensors: Tensor) -> Tensor:
        return code(*(tensor.movedim(axis, -1) for tensor in tensors)).movedim(-1, axis)

    return moved
