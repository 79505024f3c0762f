"""Hand-written modules for tests of single passes: attention as plain as it gets."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlainAttentionLayer(nn.Module):
    """Grouped attention with RoPE, un-normed; `style` says how it calls SDPA."""

    def __init__(self, style: str, window: int = 16) -> None:
        super().__init__()
        self.style, self.window = style, window
        self.q_proj, self.k_proj = nn.Linear(32, 32, bias=False), nn.Linear(32, 16, bias=False)
        self.v_proj, self.o_proj = nn.Linear(32, 16, bias=False), nn.Linear(32, 32, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q = self.q_proj(x).view(batch, tokens, 4, 8).transpose(1, 2)
        k = self.k_proj(x).view(batch, tokens, 2, 8).transpose(1, 2)
        v = self.v_proj(x).view(batch, tokens, 2, 8).transpose(1, 2)
        q, k = (t * cos + torch.cat([-t[..., 4:], t[..., :4]], dim=-1) * sin for t in (q, k))
        return x + self.o_proj(self.attend(q, k, v).transpose(1, 2).reshape(batch, tokens, 32))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        position = torch.arange(q.shape[2], device=q.device)
        seen = position <= position[:, None]
        match self.style:
            case "causal":
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            case "repeated":
                k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)
            case "tiled":  # pairs heads differently: these are not repeats of KV heads
                k, v = k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)
            case "mask":
                return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
            case "float_mask":
                bias = torch.zeros_like(seen, dtype=q.dtype).masked_fill(~seen, float("-inf"))
                return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True)
            case "window":
                near = seen & (position > position[:, None] - self.window)
                return F.scaled_dot_product_attention(q, k, v, attn_mask=near, enable_gqa=True)
            case "dilated":
                return F.scaled_dot_product_attention(
                    q, k, v, attn_mask=seen & ((position[:, None] - position) % 2 == 0), enable_gqa=True
                )
            case "bidirectional":
                return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        raise ValueError(self.style)


class PlainLM(nn.Module):
    """A causal LM that knows nothing of transformers: forward(input_ids, position_ids) -> logits."""

    def __init__(self, *styles: str, window: int = 16, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embed = nn.Embedding(64, 32)
            self.layers = nn.ModuleList(PlainAttentionLayer(style, window) for style in styles)
            self.head = nn.Linear(32, 64, bias=False)
        self.register_buffer("inv_freq", 10000.0 ** (-torch.arange(0, 8, 2) / 8))

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        angles = position_ids[:, :, None].float() * torch.cat([self.inv_freq, self.inv_freq])
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.head(x)
