"""The attention masks that kvpass knows, as plain tensor code (True: attend)."""

import torch
from torch import Tensor


def window_mask(tokens: int, window: int, device: torch.device) -> Tensor:
    """Causal attention over the last `window` tokens, the query's own included. bool[S, S]."""
    key = torch.arange(tokens, device=device)
    query = key[:, None]
    return (key <= query) & (key > query - window)


def cache_mask(slots: Tensor, capacity: int, window: int | None) -> Tensor:
    """What tokens that are written to `slots` may see of a cache: all occupied slots up to their own.

    slots i64[B, S], ascending in each row. bool[B, 1, S, C]. With a window, slots stand for positions, which holds
    in layers that drop nothing.
    """
    key = torch.arange(capacity, device=slots.device)
    query = slots[:, None, :, None]
    seen = key <= query
    return seen if window is None else seen & (key > query - window)
