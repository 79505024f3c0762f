"""What graphs do with a cache, as plain tensor code that passes inline.

Legend: B batch, H query heads, Hkv KV heads, S new tokens, C slots of the cache, D head size, L layers.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kvpass.ir.attention_op import attend
from kvpass.ir.attention_site import AttentionSite
from kvpass.ir.masks import Causal, ring_positions

Pair = tuple[Tensor, Tensor]


def store_prefix(cache: Tensor, new: Tensor) -> Tensor:
    """Write new [B, Hkv, n, D] to the first n slots of cache [B, Hkv, C, D]."""
    return torch.slice_scatter(cache, new, dim=2, start=0, end=new.shape[2])


def store_ring(mask: Causal) -> Callable[[Tensor, Tensor], Tensor]:
    """Write a prompt [B, Hkv, S, D] to a ring: each of its slots gets the last token that belongs there."""
    assert mask.reach is not None
    reach = mask.reach

    def store(cache: Tensor, new: Tensor) -> Tensor:
        last = torch.arange(1, device=new.device) + new.shape[2] - 1
        token = ring_positions(last, cache.shape[2], reach)[0].clamp(min=0)
        return store_prefix(cache, new.index_select(2, token))

    return store


def append(site: AttentionSite) -> Callable[..., Pair]:
    """Put new tokens behind those in use; in a ring, in the place of the one that is out of reach (S = 1)."""
    layer, reach = site.layer, site.mask.reach

    def run(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Pair:
        batch, heads, tokens, _ = k.shape
        row = torch.arange(batch, device=k.device)[:, None, None]
        head = torch.arange(heads, device=k.device)[:, None]
        slot = (lengths[layer][:, None] + torch.arange(tokens, device=k.device))[:, None]
        where = (row, head, slot if reach is None else slot % reach)
        return torch.index_put(keys, where, k), torch.index_put(values, where, v)

    return run


def attend_cache(site: AttentionSite) -> Callable[..., Tensor]:
    """Attention over a cache that already holds the new tokens. In a full layer slots stand for what was before."""
    layer, mask = site.layer, site.mask

    def run(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, *sinks: Tensor) -> Tensor:
        number = (lengths[layer][:, None] + torch.arange(q.shape[2], device=q.device))[:, :, None]  # [B, S, 1]
        if mask.reach is None:
            seen = mask.allowed(number, torch.arange(keys.shape[2], device=q.device))
        else:
            held = ring_positions(lengths[layer], keys.shape[2], mask.reach)[:, None]
            seen = mask.allowed(number, held) & (held >= 0)
        return _grouped(site, q, keys, values, seen, sinks)

    return run


def extend_ring(site: AttentionSite) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Attention over a ring and S new tokens, which push one another out of it, and the ring behind them.

    `new_tokens` i64[B] says how many of the S are meant. Every slot then holds the last token that belongs there.
    """
    layer, mask = site.layer, site.mask
    assert mask.reach is not None
    reach = mask.reach

    def run(
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: Tensor,
        new_tokens: Tensor,
        *sinks: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        before = lengths[layer]
        number = before[:, None] + torch.arange(q.shape[2], device=q.device)
        held = torch.cat([ring_positions(before - 1, keys.shape[2], reach), number], dim=1)[:, None]
        seen = mask.allowed(number[:, :, None], held) & (held >= 0)
        out = _grouped(site, q, torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2), seen, sinks)
        token = ring_positions(before + new_tokens - 1, keys.shape[2], reach) - before[:, None]  # among the new ones
        is_new = (token >= 0)[:, None, :, None]
        index = token.clamp(min=0)[:, None, :, None]

        def updated(cache: Tensor, new: Tensor) -> Tensor:
            chosen = new.gather(2, index.expand(-1, new.shape[1], -1, new.shape[3]))
            return store_prefix(cache, torch.where(is_new, chosen, cache))

        return out, updated(keys, k), updated(values, v)

    return run


def _grouped(
    site: AttentionSite, q: Tensor, keys: Tensor, values: Tensor, seen: Tensor, sinks: tuple[Tensor, ...]
) -> Tensor:
    """Attention of q [B, H, S, D] where seen bool[B, S, C]; the queries of a KV head lie in the query axis."""
    heads, tokens = q.shape[1], q.shape[2]
    groups = heads // keys.shape[1]
    mask = seen[:, None, None].expand(-1, -1, groups, -1, -1).flatten(2, 3)  # [B, 1, G * S, C]
    grouped = q.unflatten(1, (keys.shape[1], groups)).flatten(2, 3)  # [B, Hkv, G * S, D]
    columns = None
    for sink in sinks:  # [H] to a column for each grouped query, [Hkv, G * S, 1]
        columns = sink.unflatten(0, (keys.shape[1], groups)).repeat_interleave(tokens, dim=1)[..., None]
    out = attend(grouped, keys, values, mask, scale=site.scale, softcap=site.softcap, sinks=columns)
    ungrouped: Tensor = out.unflatten(2, (groups, tokens)).flatten(1, 2)
    return ungrouped
