"""What a press left of a layer is all that reaches the cache."""

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Node

from kvpass.ir.attention_site import attention_sites
from kvpass.ir.builder import GraphBuilder
from kvpass.ir.form import Form
from kvpass.ir.program import KVProgram, Port, Role
from kvpass.pass_manager import Pass
from kvpass.passes.insert_kv_cache import store_prefix


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
            for role, held in ((Role.KEYS, left["keys_kept"]), (Role.VALUES, left["values_kept"])):
                self._store(program, builder, role, site.layer, held, site.node)
            if site.slopes is not None and "kept" in left:
                self._store(program, builder, Role.POSITIONS, site.layer, left["kept"], site.node)
            for role in (Role.KEPT, Role.COUNT):
                if role.value in left:
                    program.add_output(Port(f"{role.value}_{site.layer}", role, site.layer), left[role.value])
            site.node.meta["evicted"] = True
            matches += 1
        return matches

    def _store(self, program: KVProgram, builder: GraphBuilder, role: Role, layer: int, held: Node, like: Node) -> None:
        old = program.output_value(role, layer)
        if held is old.args[1]:  # this half of the layer stays as it is
            return
        cache = program.input_node(role, layer)
        (new,) = builder.inline(store_prefix, [cache, held], names=[f"{role.value}_stored"], layer=layer, like=like)
        old.replace_all_uses_with(new)
        program.graph.erase_node(old)
