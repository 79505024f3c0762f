"""Attention of a long prompt in bfloat16, on CPUs where torch's own kernel multiplies in float32."""

import math

import torch
from torch import Tensor
from torch.fx import Graph
from torch.library import Library

from kvpass.ir.subgraph import argument

aten = torch.ops.aten
library = Library("kvpass", "FRAGMENT")
library.define(
    "blocked_attention(Tensor query, Tensor key, Tensor value, float? scale) -> Tensor",
    tags=(torch.Tag.flexible_layout,),
)
TOKENS = 1024  # what is won grows with the length: a fifth at about so many tokens, shorter ones were not measured
ROWS = 512  # of scores at a time, those of all query heads of a KV head; 384 to 1,024 were about as fast
SINKS = 16  # first tokens, which often have the largest scores
SPACED = 64  # tokens of the rest of the prompt
PADDING = 16  # channels for the shift; 2 and 32 were no faster


def pays() -> bool:
    """Whether bfloat16 products are fast on this CPU, and torch's attention does not use them.

    Its kernel asks MKL for them. Profiled on an EPYC with AVX512-BF16 and without AMX, the only such CPU that was at
    hand, MKL made float32 products of them, 55 to 70 % of the whole time, at a third of the rate of oneDNN's.
    """
    here = torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()
    return here and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def attend_in_blocks(graph: Graph) -> int:
    """Hand causal attention of bfloat16 tensors to `kvpass::blocked_attention`; how many were found."""
    found = 0
    for node in graph.nodes:
        if node.target is not aten.scaled_dot_product_attention.default or node.meta["dtype"] is not torch.bfloat16:
            continue
        if argument(node, "is_causal") and not argument(node, "dropout_p"):
            read = tuple(argument(node, name) for name in ("query", "key", "value", "scale"))
            node.target, node.args, node.kwargs = torch.ops.kvpass.blocked_attention.default, read, {}
            found += 1
    return found


def blocked_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """Causal attention [B, Hq, S, Dv] of query [B, Hq, S, D] to key [B, Hkv, S, D], value [B, Hkv, S, Dv].

    A product of bfloat16 is rounded to bfloat16, which spoils scores: one of 20 is off by up to 0.06. A softmax does
    not change when a number is taken from all scores of a row, so what is rounded is their distance from one that is
    among the largest, found by looking at a few: the token itself, the first ones, some of the others. Where weights
    are large it is small, and so is its rounding. The shift is a channel of its own in the product.
    """
    out = _empty(query, value)
    if query.shape[2] < TOKENS or query.shape[2] != key.shape[2]:
        attended = aten.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
        )
        return out.copy_(attended)
    heads = query.shape[1] // key.shape[1]
    by_token, written = query.transpose(1, 2), out.transpose(1, 2)
    for b in range(query.shape[0]):
        for g in range(key.shape[1]):
            own = slice(g * heads, (g + 1) * heads)
            _attend(by_token[b, :, own], key[b, g], value[b, g].contiguous(), written[b, :, own], scale)
    return out


def _attend(query: Tensor, key: Tensor, value: Tensor, out: Tensor, scale: float | None) -> None:
    """Write attention [S, R, Dv] of the query heads [S, R, D] of one KV head, key [S, D], value [S, Dv], into `out`."""
    tokens, heads, channels = query.shape
    step = ROWS // heads or 1
    rows, keys = _shifted(query, key)
    memory = query.new_empty(heads * step * tokens)
    later = torch.full((step, step), -math.inf, dtype=query.dtype).triu(1).unsqueeze(1)
    for start in range(0, tokens, step):
        end = min(start + step, tokens)
        scores = memory[: heads * (end - start) * end].view(-1, end)
        torch.addmm(
            scores,
            rows[start:end].flatten(0, 1),
            keys[:end].t(),
            beta=0,
            alpha=channels**-0.5 if scale is None else scale,
            out=scores,
        )
        scores.view(end - start, heads, end)[..., start:] += later[: end - start, :, : end - start]
        weights = torch.softmax(scores, dim=-1, out=scores)
        out[start:end] = torch.mm(weights, value[:end]).view(end - start, heads, -1)


def _shifted(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Query heads [S, R, D + PADDING] and a key [S, D + PADDING] whose products are scores less one of the largest."""
    tokens, heads, channels = query.shape
    keys = key.new_zeros(tokens, channels + PADDING)
    keys[:, :channels], keys[:, channels] = key, 1
    rows = query.new_zeros(tokens, heads, channels + PADDING)
    rows[..., :channels] = query
    places = torch.arange(tokens)
    looked_at = torch.cat([places[:SINKS], places[SINKS :: -(-tokens // SPACED)]])
    before = torch.matmul(rows, keys[looked_at].t()).masked_fill_((looked_at > places[:, None]).unsqueeze(1), -math.inf)
    rows[..., channels] = -torch.maximum((query * key.unsqueeze(1)).sum(dim=-1), before.amax(dim=-1))
    return rows, keys


def _empty(query: Tensor, value: Tensor) -> Tensor:
    """Memory as the next projection reads it: the heads of a token side by side."""
    batch, heads, tokens, _ = query.shape
    return query.new_empty(batch, tokens, heads, value.shape[3]).transpose(1, 2)


library.impl("blocked_attention", blocked_attention, "CPU")
torch.library.register_fake("kvpass::blocked_attention", lambda q, k, v, scale: _empty(q, v), lib=library)
