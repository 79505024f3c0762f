"""The methods once more, from the papers' formulas, head by head, for what kvpress cannot tell.

Nothing here is taken from ``kvpass.presses``. Scores are [Hkv, n] or [B, Hkv, n]; kept positions ascend.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def turned(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE in its full-width form; states [..., n, D], cos and sin [n, D]."""
    first, second = states.chunk(2, -1)
    return states * cos + torch.cat([-second, first], -1) * sin


@dataclass
class Layer:
    """What one attention layer computed for a prompt."""

    hidden: Tensor  # [B, S, D_model]
    plain_queries: Tensor  # [B, H, S, D], before RoPE
    plain_keys: Tensor  # [B, Hkv, S, D], before RoPE
    queries: Tensor
    keys: Tensor
    values: Tensor
    output_weight: Tensor  # [D_model, H * D]
    frequencies: Callable[[Tensor], tuple[Tensor, Tensor]]  # positions [n] -> cos, sin [n, D]

    @property
    def groups(self) -> int:
        return self.queries.shape[1] // self.keys.shape[1]


def layers_of(model: Any, ids: Tensor) -> list[Layer]:
    """Run the model and look into every attention layer."""
    seen: list[tuple[Any, dict[str, Any]]] = []

    def look(module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        seen.append((module, kwargs))

    hooks = [layer.self_attn.register_forward_pre_hook(look, with_kwargs=True) for layer in model.model.layers]
    try:
        with torch.no_grad():
            model(ids)
    finally:
        for hook in hooks:
            hook.remove()
    return [_layer(model, module, kwargs) for module, kwargs in seen]


def _layer(model: Any, module: Any, kwargs: dict[str, Any]) -> Layer:
    hidden, (cos, sin) = kwargs["hidden_states"], kwargs["position_embeddings"]
    config, size = model.config, module.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if hasattr(module, "qkv_proj"):
        parts = module.qkv_proj(hidden).split([heads * size, kv_heads * size, kv_heads * size], -1)
    else:
        parts = [getattr(module, f"{name}_proj")(hidden) for name in "qkv"]
    queries, keys, values = (part.unflatten(-1, (-1, size)).transpose(1, 2) for part in parts)
    if hasattr(module, "q_norm"):
        queries, keys = module.q_norm(queries), module.k_norm(keys)
    kind = getattr(module, "layer_type", None) if config.model_type == "gemma3_text" else None

    def frequencies(positions: Tensor) -> tuple[Tensor, Tensor]:
        more = {"layer_type": kind} if kind else {}
        found = model.model.rotary_emb(hidden, positions[None], **more)
        return found[0][0], found[1][0]

    return Layer(
        hidden,
        queries,
        keys,
        turned(queries, cos[0], sin[0]),
        turned(keys, cos[0], sin[0]),
        values,
        module.o_proj.weight,
        frequencies,
    )


def top(scores: Tensor, count: int) -> Tensor:
    """Positions of the greatest scores, ascending; the first of equal ones."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :count].sort(-1).values


def window_scores(queries: Tensor, keys: Tensor, window: int, kernel: int, positions: Tensor, last: int) -> Tensor:
    """SnapKV for one KV head: queries [G, window, D] of tokens up to `last`, keys [n, D] at `positions`.

    Keys of the window itself come first: they get infinity.
    """
    logits = queries @ keys.T / keys.shape[-1] ** 0.5
    row = torch.arange(last - window + 1, last + 1)[:, None]
    weights = logits.masked_fill(positions > row, float("-inf")).softmax(-1)
    outside = positions <= last - window
    mean = torch.where(outside, weights.mean(1), 0)  # [G, n]
    if not bool((positions.diff() == 1).all()):  # with gaps, the neighbours are the pairs that are left
        smooth = F.avg_pool1d(mean, kernel, 1, kernel // 2)
    else:  # the window's columns are cut off before smoothing
        count = int(outside.sum())
        smooth = F.pad(F.avg_pool1d(mean[:, :count], kernel, 1, kernel // 2), (0, len(positions) - count))
    return torch.where(outside, smooth.mean(0), float("inf"))


def snapkv(queries: Tensor, keys: Tensor, window: int, kernel: int = 5) -> Tensor:
    """[Hkv, n] for one row of the batch, queries [H, n, D], keys [Hkv, n, D]."""
    count = keys.shape[1]
    asked = queries[:, -window:].unflatten(0, (keys.shape[0], -1))
    positions = torch.arange(count)
    return torch.stack(
        [window_scores(q, k, window, kernel, positions, count - 1) for q, k in zip(asked, keys, strict=True)]
    )


def expected_attention(layer: Layer, row: int, part: slice, future: int, sinks: int = 4) -> Tensor:
    """[Hkv, n] for the tokens of `part`, read by queries at the `future` positions behind the whole prompt."""
    queries, keys, values = (x[row, :, part][:, sinks:] for x in (layer.plain_queries, layer.keys, layer.values))
    size, first = keys.shape[-1], layer.keys.shape[2]
    cos, sin = (x.mean(0) for x in layer.frequencies(torch.arange(first, first + future)))
    scores = []
    for head, (key, value) in enumerate(zip(keys, values, strict=True)):
        shares = []
        for query in queries[head * layer.groups : (head + 1) * layer.groups]:
            mean = query.mean(0)
            spread = (query - mean).T @ (query - mean) / len(query)
            mean = turned(mean[None], cos, sin)[0]
            spread = turned(turned(spread, cos, sin).T, cos, sin)  # R Sigma R^T, rows and then columns
            logits = key @ mean / size**0.5 + ((key @ spread) * key).sum(-1) / (2 * size)
            shares.append(logits.softmax(-1))
        scores.append(torch.stack(shares).mean(0) * value.norm(dim=-1))
    return F.pad(torch.stack(scores), (sinks, 0), value=float("inf"))


def lagkv(keys: Tensor, values: Tensor, lag: int, sinks: int = 4) -> Tensor:
    """[Hkv, n] with cross scoring, keys and values [Hkv, n, D]; a constant channel counts 0."""
    count = keys.shape[1]
    scores = torch.ones(keys.shape[:2])
    starts = range(sinks, count - 2 * lag + 1, lag)
    for start in starts:
        parts = []
        for states in (keys, values):
            own, following = states[:, start : start + lag], states[:, start + lag : start + 2 * lag]
            low, high = following.amin(1, keepdim=True), following.amax(1, keepdim=True)
            scaled = torch.where(high > low, (own - low) / (high - low), 0)
            parts.append(scaled.std(-1).softmax(-1))
        scores[:, start : start + lag] = (parts[0] + parts[1]) / 2
    return scores


def blockwise(score: Callable[[Tensor, int], Tensor], count: int, tokens: int, block: int, heads: int) -> Tensor:
    """Kept positions [Hkv, count]: block by block, `score(candidates [n], head)` -> [n]."""
    kept = []
    for head in range(heads):
        chosen = torch.arange(count)
        for start in range(count, tokens, block):
            candidates = torch.cat([chosen, torch.arange(start, min(start + block, tokens))])
            chosen = candidates[top(score(candidates, head), count)]
        kept.append(chosen)
    return torch.stack(kept)


def projected_norm(layer: Layer) -> Tensor:
    """L1 norm of each value behind the output projection, mean over the query heads. [B, Hkv, S]"""
    size = layer.values.shape[-1]
    norms = torch.zeros(layer.values.shape[:3])
    for head in range(layer.queries.shape[1]):
        weight = layer.output_weight[:, head * size : (head + 1) * size]
        own = layer.values[:, head // layer.groups] @ weight.T
        norms[:, head // layer.groups] += own.abs().sum(-1) / layer.groups
    return norms
