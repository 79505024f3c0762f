"""The attention that the last queries of the prompt pay to everything before them."""

import torch
from torch import Tensor

from kvpass.press import PressInputs


def window_attention(x: PressInputs, window: int) -> Tensor:
    """Attention weights of the last `window` queries on the S - window positions before them.

    Normalised over all positions, the window's own included; softmax in float32, the result in the queries' dtype.
    Extra memory: B * H * window * S weights, never S * S. [B, Hkv, G, window, S - window]
    """
    tokens = x.keys.shape[2]
    queries = x.per_kv_head(x.queries[:, :, -window:])
    logits = queries @ x.keys.unsqueeze(2).transpose(-1, -2) * x.scale
    key = torch.arange(tokens, device=logits.device)
    query = torch.arange(window, device=logits.device)[:, None] + (tokens - window)
    weights = logits.masked_fill(key > query, float("-inf")).softmax(-1, dtype=torch.float32)
    return weights.to(queries.dtype)[..., : tokens - window]
