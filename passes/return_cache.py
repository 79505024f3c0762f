"""Return what a prompt leaves in the cache, for runtimes that bring no cache to write to."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch.fx import Node

from kvpass.errors import VerificationError
from kvpass.ir.attention_site import attention_sites
from kvpass.ir.form import Form, Phase
from kvpass.ir.program import KVProgram
from kvpass.ir.propagate import assign_values
from kvpass.pass_manager import Pass

aten = torch.ops.aten


@dataclass(frozen=True)
class ReturnCache(Pass):
    """Give back the pairs that a prompt leaves instead of writing them to a cache; other phases stay functions as well.

    before:  keys_stored_0: f32[B, 2, C_0, 16] = slice_scatter(keys_0, keys_kept_0, 2, 0, N)     # keys_0 is an input
    after:   keys_kept_0: f32[B, 2, N, 16] leaves the graph                                      # there is no input

    A ring is returned whole, with as many slots as it can reach.
    """

    name: ClassVar[str] = "return-cache"
    requires: ClassVar[Form] = Form.CACHED
    produces: ClassVar[Form] = Form.LOWERED

    def run(self, program: KVProgram) -> int:
        if program.phase is not Phase.PREFILL:
            return 0
        reach = {site.layer: site.mask.reach for site in attention_sites(program)}
        updates = [port for port in program.outputs if port.updates]
        for port in updates:
            stored, cache = program.output_value(port.role, port.layer), program.input_node(port.role, port.layer)
            if stored.target is not aten.slice_scatter.default:
                raise VerificationError(f"output {port.name}: {stored.name} stores no prefix but {stored.target}")
            new = stored.args[1]
            assert isinstance(new, Node) and port.layer is not None
            stored.replace_all_uses_with(new)
            program.graph.erase_node(stored)
            for size in tuple(cache.users):  # of a ring: how many slots there are
                size.replace_all_uses_with(reach[port.layer])  # type: ignore[arg-type]
                program.graph.erase_node(size)
            program.graph.erase_node(cache)
        gone = {port.updates for port in updates}
        program.inputs = tuple(port for port in program.inputs if port.name not in gone)
        program.outputs = tuple(replace(port, updates=None) for port in program.outputs)
        assign_values(program, {str(node.target): node.meta["val"] for node in program.placeholders()})
        return len(updates)
