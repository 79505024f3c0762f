"""Language models that know nothing of transformers and take token ids alone."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, VOCABULARY, CONTEXT = 32, 4, 64, 256


class Attention(nn.Module):
    """Causal self-attention; `mask` says how it is told so, `rope` rotates queries and keys by a table."""

    def __init__(self, mask: str) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mask = mask
        if mask == "buffer":
            self.register_buffer("allowed", torch.ones(CONTEXT, CONTEXT, dtype=torch.bool).tril()[None, None])

    def forward(self, x: Tensor, table: Tensor | None) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = (t.view(batch, tokens, HEADS, -1) for t in self.qkv(x).split(WIDTH, dim=2))
        if table is not None and table.dim() == 4:
            q, k = _rotated(q, table), _rotated(k, table)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if table is not None and table.dim() == 3:
            q, k = _rotated(q, table), _rotated(k, table)
        if self.mask == "buffer":
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.allowed[:, :, :tokens, :tokens])
        else:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(out.transpose(1, 2).reshape(batch, tokens, WIDTH))


def _rotated(states: Tensor, table: Tensor) -> Tensor:
    """Interleaved pairs as complex numbers: [B, H, S, D] by a table [S, D / 2, 2], [B, S, H, D] by [S, 1, D / 2, 2]."""
    even, odd = states[..., 0::2], states[..., 1::2]
    cos, sin = table[..., 0], table[..., 1]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


class BareLM(nn.Module):
    """`positions`: learned (an embedding of arange), table (a RoPE table cut to the length), early (the same, in front
    of the transposition of heads and tokens), none.

    `mixing`: what else it does over tokens: nothing, or something that a KV cache does not hold.
    """

    def __init__(self, positions: str = "learned", mask: str = "causal", mixing: str = "", layers: int = 2) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CONTEXT, WIDTH)
            self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(layers))
            self.layers = nn.ModuleList(Attention(mask) for _ in range(layers))
            self.mlps = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(layers))
            self.conv = nn.Conv1d(WIDTH, WIDTH, 3)
            self.head = nn.Linear(WIDTH, VOCABULARY)
        angles = torch.arange(CONTEXT)[:, None] * 100.0 ** (-torch.arange(WIDTH // HEADS // 2) / 4)
        self.register_buffer("table", torch.stack([angles.cos(), angles.sin()], dim=-1))
        self.positions, self.mixing = positions, mixing

    def forward(self, idx: Tensor) -> Tensor:
        tokens = idx.shape[1]
        x = self.tokens(idx)
        if self.positions == "learned":
            x = x + self.places(torch.arange(tokens, device=idx.device))
        elif self.positions == "counted":  # in a way that nobody looks for
            x = x + self.places(torch.ones_like(idx).cumsum(1) - 1)
        table = self.table[:tokens] if self.positions in ("table", "early") else None
        return self.body(x, table[:, None] if table is not None and self.positions == "early" else table)

    def body(self, x: Tensor, table: Tensor | None) -> Tensor:
        for i, (norm, layer, mlp) in enumerate(zip(self.norms, self.layers, self.mlps, strict=True)):
            x = x + layer(norm(x), table)
            if i == 0:
                x = self._mixed(x)
            x = x + mlp(F.silu(x))
        return self.head(x)

    def _mixed(self, x: Tensor) -> Tensor:
        match self.mixing:
            case "convolution":
                return x + self.conv(F.pad(x.transpose(1, 2), (2, 0))).transpose(1, 2)
            case "shift":
                return x + torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)
            case "roll":
                return x + x.roll(1, dims=1)
            case "mean":
                return x + x.cumsum(1)
            case "norm":
                return x / x.std(dim=(1, 2), keepdim=True)
            case "batch":
                return x + x.mean(dim=0, keepdim=True)
        return x


class OneRowsPositions(BareLM):
    """Takes positions [B, S] and reads those of the first row for all of them."""

    def forward(self, idx: Tensor, position_ids: Tensor) -> Tensor:
        return self.body(self.tokens(idx) + self.places(position_ids[0]), None)
