"""Attention that plain SDPA cannot express: soft-capped scores, sinks, biases by distance.

`kvpass::attention` stands for it in the normal form, as `scaled_dot_product_attention` does for all other attention;
its arguments begin with those of SDPA. No backend ever sees it: `insert-kv-cache` and `lower-attention` replace it
by the tensor code of `attend`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    scale: float | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """Softmax attention of q [B, H, S, D] over k [B, Hkv, C, D] and v [B, Hkv, C, Dv], H a multiple of Hkv.

    mask is bool (True: attend) and bias float, both as they broadcast to the scores [B, H, S, C]; sinks as they
    broadcast to [B, H, S, 1]. Scores are scaled, then capped, then biased. A sink takes part in the softmax, and its
    share goes nowhere.
    """
    grouped = q.shape[1] != k.shape[1]
    if softcap is None and sinks is None and bias is None:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale, **({"enable_gqa": True} if grouped else {})
        )
    heads, tokens = q.shape[1], q.shape[2]
    if grouped:  # queries of a KV group in the query axis, so that no head is repeated in memory
        q = q.unflatten(1, (k.shape[1], heads // k.shape[1])).flatten(2, 3)
    scores = q @ k.transpose(2, 3)
    if grouped:
        scores = scores.unflatten(2, (heads // k.shape[1], tokens)).flatten(1, 2)
    scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    if is_causal:
        key = torch.arange(k.shape[2], device=q.device)
        mask = key <= key[:tokens, None]
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = _softmax(scores, sinks).to(v.dtype)
    if grouped:
        weights = weights.unflatten(1, (k.shape[1], heads // k.shape[1])).flatten(2, 3)
    out = weights @ v
    return out.unflatten(2, (heads // k.shape[1], tokens)).flatten(1, 2) if grouped else out


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Over the keys and the sink, in at least float32; the sink's own share is dropped."""
    wide = torch.promote_types(scores.dtype, torch.float32)
    if sinks is None:
        return torch.softmax(scores, dim=-1, dtype=wide)
    column = sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)
    return torch.softmax(torch.cat([scores, column], dim=-1), dim=-1, dtype=wide)[..., :-1]


def distance_bias(slopes: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """ALiBi: slopes [H] times how far keys lie behind queries; positions i64 [..., S] and [..., C], f32 [..., H, S, C].

    Distances rather than the positions of keys, which shift softmax by a constant but are large far into a text.
    """
    distance = key[..., None, None, :] - query[..., None, :, None]
    return slopes.to(torch.float32)[:, None, None] * distance


SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, float dropout_p=0.0, bool is_causal=False, "
    "Tensor? sinks=None, Tensor? slopes=None, *, float? scale=None, bool enable_gqa=False, float? softcap=None) "
    "-> Tensor"
)


@torch.library.custom_op("kvpass::attention", mutates_args=(), schema=SCHEMA)
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    softcap: float | None = None,
) -> Tensor:
    """Attention of the last tokens of a prompt, or all; sinks and slopes are [H], one number for each query head."""
    return prompt_attention(
        query,
        key,
        value,
        attn_mask,
        is_causal=is_causal,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        slopes=slopes,
    ).contiguous()


def prompt_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    is_causal: bool,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    slopes: Tensor | None,
) -> Tensor:
    """What `kvpass::attention` computes, as plain tensor code: the queries are those of the last tokens."""
    bias = None
    if slopes is not None:
        position = torch.arange(key.shape[2], device=query.device)
        asking = position if query.shape[2] == key.shape[2] else position[key.shape[2] - query.shape[2] :]
        bias = distance_bias(slopes, asking, position)
    columns = None if sinks is None else sinks[:, None, None]
    return attend(query, key, value, mask, scale=scale, softcap=softcap, sinks=columns, bias=bias, is_causal=is_causal)


@attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> Tensor:
    return query.new_empty((*query.shape[:3], value.shape[3]), dtype=value.dtype)


ATTENTION: OpOverload = torch.ops.kvpass.attention.default
