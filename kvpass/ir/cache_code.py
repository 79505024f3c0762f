"""What graphs do with a cache, as plain tensor code that passes inline.

Legend: B batch, H query heads, Hkv KV heads, S new tokens, C slots of the cache, D head size, L layers.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from kvpass.ir.attention_op import attend
from kvpass.ir.attention_site import AttentionSite
from kvpass.ir.masks import Causal, ring_positions

Pair = tuple[Tensor, Tensor]


def store_prefix(cache: Tensor, new: Tensor) -> Tensor:
    """Write new [B, Hkv, n, ...] to the first n slots of cache [B, Hkv, C, ...]."""
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


def store_positions(cache: Tensor, position_ids: Tensor) -> Tensor:
    """Write the positions [B, S] of a prompt to the first S slots of cache [B, Hkv, C]."""
    return store_prefix(cache, position_ids[:, None].expand(-1, cache.shape[1], -1))


def append_positions(site: AttentionSite) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Put the positions of new tokens where `append` puts their keys."""
    layer = site.layer

    def run(cache: Tensor, position_ids: Tensor, lengths: Tensor) -> Tensor:
        batch, tokens = position_ids.shape
        where = _slots(lengths[layer], batch, cache.shape[1], tokens, None)
        return torch.index_put(cache, where, position_ids[:, None].expand(-1, cache.shape[1], -1))

    return run


def _slots(lengths: Tensor, batch: int, heads: int, tokens: int, reach: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of the slots behind `lengths` [B] entries, [B, Hkv, S] together."""
    row = torch.arange(batch, device=lengths.device)[:, None, None]
    head = torch.arange(heads, device=lengths.device)[:, None]
    slot = (lengths[:, None] + torch.arange(tokens, device=lengths.device))[:, None]
    return row, head, slot if reach is None else slot % reach


def append(site: AttentionSite) -> Callable[..., Pair]:
    """Put new tokens behind those in use; in a ring, in the place of the one that is out of reach (S = 1)."""
    layer, reach = site.layer, site.mask.reach

    def run(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Pair:
        batch, heads, tokens, _ = k.shape
        where = _slots(lengths[layer], batch, heads, tokens, reach)
        return torch.index_put(keys, where, k), torch.index_put(values, where, v)

    return run


def attend_cache(site: AttentionSite) -> Callable[..., Tensor]:
    """Attention over a cache that already holds the new tokens. In a full layer slots stand for what was before.

    `extra` is what the site reads beside them, then positions [B, Hkv, C] and position_ids [B, S] if it tracks these.
    """
    holder, mask = site.holder, site.mask

    def run(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, *extra: Tensor) -> Tensor:
        number = (lengths[holder][:, None] + torch.arange(q.shape[2], device=q.device))[:, :, None]  # [B, S, 1]
        named = _named(site, extra)
        if mask.reach is None:
            held = torch.arange(keys.shape[2], device=q.device)
            seen = mask.allowed(number, held)
        else:
            held = ring_positions(lengths[holder], keys.shape[2], mask.reach)[:, None]
            seen = mask.allowed(number, held) & (held >= 0)
        if "positions" in named:
            distance = named["positions"][:, :, None] - named["position_ids"][:, None, :, None]
        else:
            distance = (held - number)[:, None]
        return _grouped(site, q, keys, values, seen, distance, named)

    return run


def join_ring(keys: Tensor, values: Tensor, k: Tensor, v: Tensor) -> Pair:
    """What a ring holds and what pushes it out, one behind the other."""
    return torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2)


def attend_joined(site: AttentionSite) -> Callable[..., Tensor]:
    """Attention of S new tokens over what `join_ring` made, keys and values [B, Hkv, C + S, D]."""
    holder, mask = site.holder, site.mask
    assert mask.reach is not None
    reach = mask.reach

    def run(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, *extra: Tensor) -> Tensor:
        before, tokens = lengths[holder], q.shape[2]
        number = before[:, None] + torch.arange(tokens, device=q.device)
        held = torch.cat([ring_positions(before - 1, keys.shape[2] - tokens, reach), number], dim=1)[:, None]
        seen = mask.allowed(number[:, :, None], held) & (held >= 0)
        distance = (held - number[:, :, None])[:, None]
        return _grouped(site, q, keys, values, seen, distance, _named(site, extra))

    return run


def update_ring(site: AttentionSite) -> Callable[..., Pair]:
    """Put into every slot of a ring the last token that belongs there, out of what `join_ring` made.

    `new_tokens` i64[B] says how many of the S new ones are meant.
    """
    layer, reach = site.layer, site.mask.reach
    assert reach is not None

    def run(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, lengths: Tensor, new_tokens: Tensor) -> Pair:
        before, slots = lengths[layer], keys.shape[2]
        token = ring_positions(before + new_tokens - 1, slots, reach) - before[:, None]  # negative: an old one
        index = torch.where(token >= 0, token + slots, torch.arange(slots, device=token.device))[:, None, :, None]

        def updated(cache: Tensor, joined: Tensor) -> Tensor:
            return store_prefix(cache, joined.gather(2, index.expand(-1, cache.shape[1], -1, cache.shape[3])))

        return updated(keys, k), updated(values, v)

    return run


def _named(site: AttentionSite, extra: Sequence[Tensor]) -> dict[str, Tensor]:
    tracked = ("positions", "position_ids") if site.tracks_positions else ()
    return dict(zip((*site.extras, *tracked), extra, strict=True))


def _grouped(
    site: AttentionSite,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    seen: Tensor,
    distance: Tensor,
    named: Mapping[str, Tensor],
) -> Tensor:
    """Attention of q [B, H, S, D] where seen bool[B, S, C]; the queries of a KV head lie in the query axis.

    distance i64[B, Hkv or 1, S, C] is the position of an entry less that of a query.
    """
    heads, tokens = q.shape[1], q.shape[2]
    groups = heads // keys.shape[1]
    mask = seen[:, None, None].expand(-1, -1, groups, -1, -1).flatten(2, 3)  # [B, 1, G * S, C]
    grouped = q.unflatten(1, (keys.shape[1], groups)).flatten(2, 3)  # [B, Hkv, G * S, D]
    columns = bias = None
    if "sinks" in named:  # [H] to a column for each grouped query, [Hkv, G * S, 1]
        columns = named["sinks"].unflatten(0, (keys.shape[1], groups)).repeat_interleave(tokens, dim=1)[..., None]
    if "slopes" in named:
        slopes = named["slopes"].unflatten(0, (keys.shape[1], groups))[..., None, None]
        bias = (slopes * distance[:, :, None]).flatten(2, 3)  # [B, Hkv, G * S, C]
    out = attend(grouped, keys, values, mask, scale=site.scale, softcap=site.softcap, sinks=columns, bias=bias)
    ungrouped: Tensor = out.unflatten(2, (groups, tokens)).flatten(1, 2)
    return ungrouped
