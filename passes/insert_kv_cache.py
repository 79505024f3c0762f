"""Give every attention layer a place in the cache."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from kvpass.ir.attention_op import attend
from kvpass.ir.attention_site import AttentionSite, attention_sites
from kvpass.ir.builder import GraphBuilder
from kvpass.ir.form import Form, Phase
from kvpass.ir.masks import cache_mask
from kvpass.ir.program import KVProgram, Port, Role
from kvpass.pass_manager import Pass

CAPACITY_HINT, WINDOW_HINT = 1021, 1027  # not sizes that anything else has


@dataclass(frozen=True)
class InsertKVCache(Pass):
    """Write each layer's keys and values to a cache that enters and leaves the graph.

    prefill  keys_out_0: f32[B, 2, C_0, 16] = slice_scatter(keys_0, add_2, 2, 0, S)         # attention as it was
    extend   keys_out_0: f32[B, 2, C_0, 16] = index_put(keys_0, [.., .., slots], add_2)
    decode   attended_0: f32[B, 4, S, 16] = scaled_dot_product_attention(add_1, keys_out_0, values_out_0, mask)

    New tokens take the slots behind those in use (`lengths`, per layer and row). The queries that share a KV head
    go into the query axis, so that no head is ever repeated in memory.
    """

    name: ClassVar[str] = "insert-kv-cache"
    requires: ClassVar[Form] = Form.SPECIALIZED
    produces: ClassVar[Form] = Form.CACHED

    def run(self, program: KVProgram) -> int:
        if any(port.role is Role.KEYS for port in program.inputs):
            return 0
        builder = GraphBuilder(program, self.name)
        sites = attention_sites(program)
        lengths = None
        if program.phase is not Phase.PREFILL:
            ids = program.input_node(Role.INPUT_IDS).meta["val"]
            value = program.shapes.empty((len(sites), ids.shape[0]), torch.int64, ids.device)
            lengths = builder.placeholder(Port("lengths", Role.LENGTHS), value)
        caches = [self._placeholders(program, builder, site) for site in sites]
        for site, (keys, values) in zip(sites, caches, strict=True):
            positions = self._positions(program, builder, site, keys)
            if lengths is None:
                new_keys, new_values = _store(builder, site, keys, values)
            else:
                new_keys, new_values = _append(builder, site, keys, values, lengths)
            if positions is not None:
                positions = _place_positions(program, builder, site, positions, lengths)
            if lengths is not None:
                _attend(builder, site, new_keys, new_values, lengths, positions)
            program.add_output(Port(f"keys_out_{site.layer}", Role.KEYS, site.layer, keys.name), new_keys)
            program.add_output(Port(f"values_out_{site.layer}", Role.VALUES, site.layer, values.name), new_values)
            if positions is not None:
                port = Port(f"positions_out_{site.layer}", Role.POSITIONS, site.layer, f"positions_{site.layer}")
                program.add_output(port, positions)
        program.graph.eliminate_dead_code()
        return len(sites)

    def _placeholders(self, program: KVProgram, builder: GraphBuilder, site: AttentionSite) -> tuple[Node, Node]:
        # Layers may differ in what they hold, so each has a capacity of its own.
        letter, hint = ("C", CAPACITY_HINT) if site.pressable else ("W", WINDOW_HINT)
        tokens = program.input_node(Role.INPUT_IDS).meta["val"].shape[1]
        longest = tokens if isinstance(tokens, int) else int(tokens.node.hint)
        capacity = program.shapes.dim(f"{letter}_{site.layer}", hint=hint + 2 * longest)  # more than any prompt
        nodes = []
        for role, tap in ((Role.KEYS, site.keys), (Role.VALUES, site.values)):
            like = tap.meta["val"]
            batch, heads, _, width = like.shape
            value = program.shapes.empty((batch, heads, capacity, width), like.dtype, like.device)
            nodes.append(builder.placeholder(Port(f"{role.value}_{site.layer}", role, site.layer), value))
        return nodes[0], nodes[1]

    def _positions(self, program: KVProgram, builder: GraphBuilder, site: AttentionSite, keys: Node) -> Node | None:
        """Where each entry of the cache stands in the text, for a layer whose scores depend on that."""
        if site.slopes is None:
            return None
        like = keys.meta["val"]
        value = program.shapes.empty(like.shape[:3], torch.int64, like.device)
        return builder.placeholder(Port(f"positions_{site.layer}", Role.POSITIONS, site.layer), value)


def store_prefix(cache: Tensor, new: Tensor) -> Tensor:
    """Write new [B, Hkv, n, ...] to the first n slots of cache [B, Hkv, C, ...]."""
    return torch.slice_scatter(cache, new, dim=2, start=0, end=new.shape[2])


def _store(builder: GraphBuilder, site: AttentionSite, keys: Node, values: Node) -> tuple[Node, Node]:
    (new_keys,) = builder.inline(store_prefix, [keys, site.keys], names=["keys_out"], layer=site.layer, like=site.node)
    (new_values,) = builder.inline(
        store_prefix, [values, site.values], names=["values_out"], layer=site.layer, like=site.node
    )
    return new_keys, new_values


def _append(builder: GraphBuilder, site: AttentionSite, keys: Node, values: Node, lengths: Node) -> tuple[Node, Node]:
    layer = site.layer

    def append(keys: Tensor, values: Tensor, lengths: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        batch, heads, tokens, _ = k.shape
        where = _next_slots(lengths[layer], batch, heads, tokens)
        return torch.index_put(keys, where, k), torch.index_put(values, where, v)

    inputs = [keys, values, lengths, site.keys, site.values]
    new_keys, new_values = builder.inline(append, inputs, names=["keys_out", "values_out"], layer=layer, like=site.node)
    return new_keys, new_values


def _next_slots(lengths: Tensor, batch: int, heads: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Row, head and slot of new tokens behind `lengths` [B] entries; as indices they are [B, Hkv, S]."""
    row = torch.arange(batch, device=lengths.device)[:, None, None]
    head = torch.arange(heads, device=lengths.device)[:, None]
    slot = (lengths[:, None] + torch.arange(tokens, device=lengths.device))[:, None]
    return row, head, slot


def _place_positions(
    program: KVProgram, builder: GraphBuilder, site: AttentionSite, positions: Node, lengths: Node | None
) -> Node:
    """The new tokens' positions go where their keys go."""
    layer = site.layer

    def place(positions: Tensor, position_ids: Tensor, *lengths: Tensor) -> Tensor:
        heads, tokens = positions.shape[1], position_ids.shape[1]
        new = position_ids[:, None].expand(-1, heads, -1)
        if not lengths:
            return store_prefix(positions, new)
        return torch.index_put(positions, _next_slots(lengths[0][layer], new.shape[0], heads, tokens), new)

    inputs = [positions, program.input_node(Role.POSITION_IDS), *([lengths] if lengths else [])]
    (new,) = builder.inline(place, inputs, names=["positions_out"], layer=layer, like=site.node)
    return new


def _attend(
    builder: GraphBuilder, site: AttentionSite, keys: Node, values: Node, lengths: Node, positions: Node | None
) -> None:
    layer, window, scale, softcap = site.layer, site.window, site.scale, site.softcap
    extras = {"sinks": site.sinks} if site.sinks else {}
    if site.slopes is not None and positions is not None:
        position_ids = builder.program.input_node(Role.POSITION_IDS)
        extras |= {"slopes": site.slopes, "positions": positions, "position_ids": position_ids}

    def attended(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, *extra: Tensor) -> Tensor:
        _, heads, tokens, _ = q.shape
        groups = heads // keys.shape[1]
        slots = lengths[layer][:, None] + torch.arange(tokens, device=q.device)
        mask = cache_mask(slots, keys.shape[2], window)
        mask = mask[:, :, None].expand(-1, -1, groups, -1, -1).flatten(2, 3)  # [B, 1, G * S, C]
        grouped = q.unflatten(1, (keys.shape[1], groups)).flatten(2, 3)  # [B, Hkv, G * S, D]
        given = dict(zip(extras, extra, strict=True))
        columns = bias = None
        if "sinks" in given:  # [H] to a column for each grouped query, [Hkv, G * S, 1]
            columns = given["sinks"].unflatten(0, (keys.shape[1], groups)).repeat_interleave(tokens, dim=1)[..., None]
        if "slopes" in given:  # as `distance_bias`, but the KV heads of a layer hold different tokens
            distance = given["positions"][:, :, None, None] - given["position_ids"][:, None, None, :, None]
            slopes = given["slopes"].unflatten(0, (keys.shape[1], groups))[..., None, None]
            bias = (slopes * distance).flatten(2, 3)  # [B, Hkv, G * S, C]
        out = attend(grouped, keys, values, mask, scale=scale, softcap=softcap, sinks=columns, bias=bias)
        ungrouped: Tensor = out.unflatten(2, (groups, tokens)).flatten(1, 2)
        return ungrouped

    inputs = [site.queries, keys, values, lengths, *extras.values()]
    (out,) = builder.inline(attended, inputs, names=["attended"], layer=layer, like=site.node)
    site.node.replace_all_uses_with(out)
    builder.program.graph.erase_node(site.node)
