"""Write the cache where it lies."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from kvpass.errors import VerificationError
from kvpass.ir.builder import GraphBuilder
from kvpass.ir.form import Form
from kvpass.ir.program import KVProgram, Port
from kvpass.pass_manager import Pass

aten = torch.ops.aten


@dataclass(frozen=True)
class WriteCacheInPlace(Pass):
    """Turn the functional cache updates into writes to the inputs; nothing of the cache is copied or returned.

    before:  keys_out_0: f32[B, 2, C, 16] = index_put(keys_0, [.., .., slots], add_2)
    after:   keys_out_0: f32[B, 2, C, 16] = index_put_(keys_0, [.., .., slots], add_2)

    From here on the graph is no function any more, and nodes may not be reordered across a write.
    """

    name: ClassVar[str] = "write-cache-in-place"
    requires: ClassVar[Form] = Form.CACHED
    produces: ClassVar[Form] = Form.LOWERED

    def run(self, program: KVProgram) -> int:
        builder = GraphBuilder(program, self.name)
        updates = [port for port in program.outputs if port.updates]
        for port in updates:
            node = program.output_value(port.role, port.layer)
            cache = program.input_node(port.role, port.layer)
            if late := [user.name for user in cache.users if user > node]:
                raise VerificationError(f"{late[0]} reads {cache.name} behind {node.name}, which overwrites it")
            program.drop_output(port)
            if node.target is aten.index_put.default:
                node.target = aten.index_put_.default
            elif node.target is aten.slice_scatter.default:
                self._store(builder, node, port)
            else:
                raise VerificationError(f"output {port.name}: {node.name} is no cache update but {node.target}")
        return len(updates)

    def _store(self, builder: GraphBuilder, node: Node, port: Port) -> None:
        cache, new = node.args[:2]
        assert isinstance(cache, Node) and isinstance(new, Node)
        builder.program.graph.erase_node(node)
        builder.inline(overwrite_prefix, [cache, new], names=[f"{port.role.value}_written"], layer=port.layer, like=new)


def overwrite_prefix(cache: Tensor, new: Tensor) -> Tensor:
    """Write new [B, Hkv, n, D] to the first n slots of cache [B, Hkv, C, D]."""
    return cache[:, :, : new.shape[2]].copy_(new)
