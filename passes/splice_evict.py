"""What a press left of a layer is all that reaches the cache."""

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Node

from kvpass.ir.attention_site import AttentionSite, attention_sites
from kvpass.ir.builder import GraphBuilder
from kvpass.ir.cache_code import store_prefix, store_ring
from kvpass.ir.form import Form
from kvpass.ir.program import KVProgram, Port, Role
from kvpass.pass_manager import Pass


@dataclass(frozen=True)
class SpliceEvict(Pass):
    """Store what the press left instead of all; attention itself has read everything.

    before:  keys_out_0: f32[B, 2, C, 16] = slice_scatter(keys_0, add_2, 2, 0, S)
    after:   keys_stored_0: f32[B, 2, C, 16] = slice_scatter(keys_0, keys_kept_0, 2, 0, N)
    """

    name: ClassVar[str] = "splice-evict"
    requires: ClassVar[Form] = Form.PRESSED
    produces: ClassVar[Form] = Form.COMPRESSED

    def run(self, program: KVProgram) -> int:
        builder = GraphBuilder(program, self.name)
        nodes = {node.name: node for node in program.graph.nodes}
        matches = 0
        for site in attention_sites(program):
            left = {role: nodes[name] for role, name in site.node.meta.get("press", {}).items()}
            if not left or site.node.meta.get("evicted"):
                continue
            for role, tap in ((Role.KEYS, site.keys), (Role.VALUES, site.values)):
                if (held := left[f"{role.value}_kept"]) is not tap:  # else this half of the layer stays as it is
                    self._store(program, builder, role, site, held)
            if site.tracks_positions and "kept" in left:
                self._store(program, builder, Role.POSITIONS, site, left["kept"])
            for role in (Role.KEPT, Role.COUNT):
                if role.value in left:
                    program.add_output(Port(f"{role.value}_{site.layer}", role, site.layer), left[role.value])
            site.node.meta["evicted"] = True
            matches += 1
        return matches

    def _store(self, program: KVProgram, builder: GraphBuilder, role: Role, site: AttentionSite, held: Node) -> None:
        old, cache = program.output_value(role, site.layer), program.input_node(role, site.layer)
        store = store_ring(site.mask) if site.bounded else store_prefix
        names = [f"{role.value}_stored"]
        (new,) = builder.inline(store, [cache, held], names=names, layer=site.layer, like=site.node)
        old.replace_all_uses_with(new)
        program.graph.erase_node(old)
