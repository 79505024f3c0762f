"""The attention that the last queries of the prompt pay to everything before them."""

import torch
from torch import Tensor

from kvpass.press_inputs import PressInputs
from kvpass.selection import protect


def window_attention(x: PressInputs, window: int) -> Tensor:
    """Attention weights of the last `window` queries on the S - window positions before them.

    Normalised over all positions, the window's own included; softmax in float32, the result in the queries' dtype.
    Extra memory: B * H * window * S weights, never S * S. [B, Hkv, G, window, S - window]

    Where pairs are missing (`x.positions`) the window's own columns stay and hold zeros: [B, Hkv, G, window, S]
    """
    tokens, first = x.keys.shape[2], x.queries.shape[2] - window
    queries = x.per_kv_head(x.queries[:, :, first:])
    # all queries of a KV head side by side: its keys are not repeated for each of them
    products = queries.flatten(2, 3) @ x.keys.transpose(-1, -2)
    logits: Tensor = products.unflatten(2, queries.shape[2:4]) * x.scale
    query = torch.arange(window, device=logits.device)[:, None] + first
    key = torch.arange(tokens, device=logits.device) if x.positions is None else x.positions[:, :, None, None]
    weights = logits.masked_fill(key > query, float("-inf")).softmax(-1, dtype=torch.float32).to(queries.dtype)
    if x.positions is None:
        return weights[..., : tokens - window]
    return weights.masked_fill(key >= first, 0)


def protect_window(x: PressInputs, scores: Tensor, window: int) -> Tensor:
    """The pairs of the last `window` tokens before all others; `scores` are for the columns of `window_attention`."""
    if x.positions is None:
        return protect(scores, after=window)
    top = scores.amax(dim=(1, 2), keepdim=True) + 1
    return torch.where(x.positions >= x.queries.shape[2] - window, top, scores)


def smooth(values: Tensor, kernel_size: int) -> Tensor:
    """Moving average over the last axis with zeros beyond both ends, zeros counted; float32 inside."""
    length, half = values.shape[-1], kernel_size // 2
    zeros = torch.zeros_like(values[..., :1]).expand(*values.shape[:-1], half)
    padded = torch.cat([zeros, values, zeros], dim=-1).to(torch.float32)
    total = padded[..., :length]
    for shift in range(1, kernel_size):
        total = total + padded[..., shift : shift + length]
    return (total / kernel_size).to(values.dtype)
