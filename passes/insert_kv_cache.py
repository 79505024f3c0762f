"""Give every attention layer a place in the cache."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from kvpass.ir.attention_site import AttentionSite, attention_sites
from kvpass.ir.builder import GraphBuilder
from kvpass.ir.cache_code import (
    append,
    append_positions,
    attend_cache,
    attend_joined,
    join_ring,
    store_positions,
    store_prefix,
    store_ring,
    update_ring,
)
from kvpass.ir.form import Form, Phase
from kvpass.ir.program import KVProgram, Port, Role
from kvpass.ir.symbols import Size
from kvpass.pass_manager import Pass

CAPACITY_HINT, WINDOW_HINT = 1021, 1027  # not sizes that anything else has


@dataclass(frozen=True)
class InsertKVCache(Pass):
    """Write each layer's keys and values to a cache that enters and leaves the graph.

    prefill  keys_out_0: f32[B, 2, C_0, 16] = slice_scatter(keys_0, add_2, 2, 0, S)         # attention as it was
    extend   keys_out_0: f32[B, 2, C_0, 16] = index_put(keys_0, [.., .., slots], add_2)
    decode   attended_0: f32[B, 4, S, 16] = scaled_dot_product_attention(add_1, keys_out_0, values_out_0, mask)

    New tokens take the slots behind those in use (`lengths`, per layer and row). Layers of windows or chunks hold a
    ring: token p lies in slot p % reach, `lengths` counts all that were seen. The queries that share a KV head go into
    the query axis, so that no head is ever repeated in memory. Layers that share their keys read one cache. Where
    scores depend on the distance in the text, the cache also holds the position of each entry.
    """

    name: ClassVar[str] = "insert-kv-cache"
    requires: ClassVar[Form] = Form.SPECIALIZED
    produces: ClassVar[Form] = Form.CACHED

    def run(self, program: KVProgram) -> int:
        if any(port.role is Role.KEYS for port in program.inputs):
            return 0
        builder = GraphBuilder(program, self.name)
        sites = attention_sites(program)
        batch = program.input_node(Role.INPUT_IDS).meta["val"].shape[0]
        counts = []
        if program.phase is not Phase.PREFILL:
            counts.append(self._counter(builder, Role.LENGTHS, (len(sites), batch)))
        if program.phase is Phase.EXTEND and any(site.bounded for site in sites):
            counts.append(self._counter(builder, Role.NEW_TOKENS, (batch,)))
        caches = {site.layer: self._placeholders(program, builder, site) for site in sites if site.holds_cache}
        held: dict[int, _Held] = {}
        for site in sites:
            if site.holds_cache:
                held[site.layer] = self._update(program, builder, site, caches[site.layer], counts)
            if program.phase is not Phase.PREFILL:
                self._attend(program, builder, site, held[site.holder], counts[0])
        program.graph.eliminate_dead_code()
        return len(sites)

    def _counter(self, builder: GraphBuilder, role: Role, shape: tuple[Size, ...]) -> Node:
        program = builder.program
        device = program.input_node(Role.INPUT_IDS).meta["val"].device
        return builder.placeholder(Port(role.value, role), program.shapes.empty(shape, torch.int64, device))

    def _placeholders(self, program: KVProgram, builder: GraphBuilder, site: AttentionSite) -> list[Node]:
        # Layers may differ in what they hold, so each has a capacity of its own.
        letter, hint = ("W", WINDOW_HINT) if site.bounded else ("C", CAPACITY_HINT)
        tokens = program.input_node(Role.INPUT_IDS).meta["val"].shape[1]
        longest = tokens if isinstance(tokens, int) else int(tokens.node.hint)
        capacity = program.shapes.dim(f"{letter}_{site.layer}", hint=hint + 2 * longest)  # more than any prompt
        nodes = []
        for role, tap in ((Role.KEYS, site.keys), (Role.VALUES, site.values)):
            like = tap.meta["val"]
            batch, heads, _, width = like.shape
            value = program.shapes.empty((batch, heads, capacity, width), like.dtype, like.device)
            nodes.append(builder.placeholder(Port(f"{role.value}_{site.layer}", role, site.layer), value))
        return nodes

    def _track(
        self, program: KVProgram, builder: GraphBuilder, site: AttentionSite, keys: Node, counts: list[Node]
    ) -> list[Node]:
        """The positions of what the cache holds then, and those of the new tokens."""
        value = program.shapes.empty(keys.meta["val"].shape[:3], torch.int64, keys.meta["val"].device)
        old = builder.placeholder(Port(f"positions_{site.layer}", Role.POSITIONS, site.layer), value)
        position_ids = program.input_node(Role.POSITION_IDS)
        place = append_positions(site) if counts else store_positions
        inputs = [old, position_ids, *counts[:1]]
        (new,) = builder.inline(place, inputs, names=["positions_out"], layer=site.layer, like=site.node)
        program.add_output(Port(f"positions_out_{site.layer}", Role.POSITIONS, site.layer, old.name), new)
        return [new, position_ids]

    def _update(
        self, program: KVProgram, builder: GraphBuilder, site: AttentionSite, cache: list[Node], counts: list[Node]
    ) -> "_Held":
        """Let the new cache leave the graph."""

        def inline(code: Callable[..., Any], inputs: Sequence[Node], *names: str) -> list[Node]:
            return list(builder.inline(code, inputs, names=names, layer=site.layer, like=site.node))

        new, names = (site.keys, site.values), ("keys_out", "values_out")
        tracked = self._track(program, builder, site, cache[0], counts) if site.tracks_positions else []
        if program.phase is Phase.PREFILL:
            store = store_ring(site.mask) if site.bounded else store_prefix
            stored = seen = [inline(store, pair, name)[0] for *pair, name in zip(cache, new, names, strict=True)]
        elif program.phase is Phase.EXTEND and site.bounded:
            seen = inline(join_ring, [*cache, *new], "keys_seen", "values_seen")
            stored = inline(update_ring(site), [*cache, *seen, *counts], *names)
        else:
            stored = seen = inline(append(site), [*cache, *new, counts[0]], *names)
        for role, old, value in zip((Role.KEYS, Role.VALUES), cache, stored, strict=True):
            program.add_output(Port(f"{role.value}_out_{site.layer}", role, site.layer, old.name), value)
        return _Held(seen, tracked)

    def _attend(
        self, program: KVProgram, builder: GraphBuilder, site: AttentionSite, held: "_Held", lengths: Node
    ) -> None:
        """Let attention read the cache; that of a ring and more tokens, what these push out as well."""
        code = attend_joined if program.phase is Phase.EXTEND and site.bounded else attend_cache
        inputs = [site.queries, *held.seen, lengths, *site.extras.values(), *held.tracked]
        (out,) = builder.inline(code(site), inputs, names=["attended"], layer=site.layer, like=site.node)
        site.node.replace_all_uses_with(out)
        program.graph.erase_node(site.node)


@dataclass(frozen=True)
class _Held:
    """What the attentions of a cache read: keys and values, and positions where they are tracked."""

    seen: list[Node]
    tracked: list[Node]
