"""From scores to kept pairs: which ones, where they were, what they hold. Deterministic, without a sort."""

import torch
from torch import Tensor


def best(scores: Tensor, count: int) -> Tensor:
    """Mark the `count` greatest scores of the last axis; among equal ones the first. Like scores, bool.

    topk finds the threshold only: which of equal scores it would take depends on the backend.
    """
    threshold = scores.topk(count, dim=-1).values[..., -1:]
    better, equal = scores > threshold, scores == threshold
    room = count - better.sum(dim=-1, keepdim=True)
    return better | (equal & (equal.cumsum(dim=-1) <= room))


def compact(keep: Tensor, count: int) -> Tensor:
    """The marked positions of the last axis, ascending, in `count` slots; slots that are left over hold 0.

    keep bool[B, Hkv, S] -> i64[B, Hkv, count]
    """
    batch, heads, tokens = keep.shape
    rank = torch.where(keep, keep.cumsum(dim=-1) - 1, count)  # what is dropped goes to the last slot and is cut off
    position = torch.arange(tokens, device=keep.device).expand(batch, heads, tokens)
    slots = position.new_zeros(batch, heads, count + 1)
    return slots.scatter(-1, rank, position)[..., :count]


def gather(states: Tensor, kept: Tensor) -> Tensor:
    """states [B, Hkv, S, D], kept i64[B, Hkv, N] -> [B, Hkv, N, D]."""
    return states.gather(2, kept[..., None].expand(-1, -1, -1, states.shape[-1]))


def protect(scores: Tensor, *, before: int = 0, after: int = 0) -> Tensor:
    """Add positions that are kept before all others: they get the row's greatest score, plus one.

    scores [B, Hkv, S - before - after] -> [B, Hkv, S]
    """
    top = (scores.amax(dim=(1, 2), keepdim=True) + 1).expand(-1, scores.shape[1], -1)
    ends = [top.expand(-1, -1, count) for count in (before, after)]
    return torch.cat([end for end in (ends[0], scores, ends[1]) if end.shape[-1] != 0], dim=-1)
