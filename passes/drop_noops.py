"""Remove what capture leaves behind and no result needs."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import SymInt, Tensor
from torch.fx import Node

from kvpass.ir.form import Form
from kvpass.ir.program import KVProgram, Role
from kvpass.ir.propagate import is_size
from kvpass.ir.subgraph import argument
from kvpass.pass_manager import Pass

aten = torch.ops.aten
CASTS = (aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout, aten.to.device)
IDENTITIES = (aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default)
VIEWS = (aten.view.default, aten._unsafe_view.default)


@dataclass(frozen=True)
class DropNoops(Pass):
    """Drop checks and operations that return their input; let views copy if they must; read sizes off the inputs.

    before:  to_copy: f32[B, S, 64] = _to_copy(embedding, dtype=f32)      # it is f32 already
             mul_3: f32[B, S, 16] = mul(cos, 1.0)
             view_7: f32[B, S, 64] = view(transpose_7, [B, S, -1])        # legal for the strides seen in the trace
    after:   reshape_7: f32[B, S, 64] = reshape(transpose_7, [B, S, -1])
    """

    name: ClassVar[str] = "drop-noops"
    requires: ClassVar[Form] = Form.CAPTURED
    produces: ClassVar[Form] = Form.CAPTURED

    def run(self, program: KVProgram) -> int:
        matches = self._share_sizes(program)
        for node in list(program.graph.nodes):
            if node.op != "call_function":
                continue
            if node.target is aten._assert_tensor_metadata.default:
                program.graph.erase_node(node)
            elif _is_identity(program, node):
                node.replace_all_uses_with(node.args[0])
                program.graph.erase_node(node)
            elif node.target in VIEWS:
                node.target = aten.reshape.default
                node._rename("reshape")
            else:
                continue
            matches += 1
        program.graph.eliminate_dead_code()
        return matches

    def _share_sizes(self, program: KVProgram) -> int:
        """Read B and S once, off `input_ids`, so that no dataflow runs through a size."""
        ids = program.input_node(Role.INPUT_IDS)
        first = next(node for node in program.graph.nodes if node.op == "call_function")
        shared: dict[str, Node] = {}
        matches = 0
        for node in list(program.graph.nodes):
            if not is_size(node) or node.target is not aten.sym_size.int:
                continue
            name = program.shapes.text(node.meta["val"])
            if name not in ("B", "S"):
                continue
            if name not in shared:
                with program.graph.inserting_before(first):
                    shared[name] = program.graph.call_function(aten.sym_size.int, (ids, "BS".index(name)))
                shared[name].meta["val"] = node.meta["val"]
            if node.args != shared[name].args:
                matches += 1
            node.replace_all_uses_with(shared[name])
            if node is first:
                first = first.next
            program.graph.erase_node(node)
        return matches


def _is_identity(program: KVProgram, node: Node) -> bool:
    source = node.args[0] if node.args else None
    if not isinstance(source, Node) or not isinstance(node.meta["val"], Tensor):
        return False
    old, new = source.meta["val"], node.meta["val"]
    if not isinstance(old, Tensor) or old.dtype != new.dtype or old.device != new.device:
        return False
    if [program.shapes.text(n) for n in old.shape] != [program.shapes.text(n) for n in new.shape]:
        return False
    if node.target in (*IDENTITIES, *CASTS, *VIEWS, aten.reshape.default, aten.expand.default):
        return True
    if node.target is aten.mul.Tensor:
        return not isinstance(node.args[1], Node) and bool(node.args[1] == 1.0)
    if node.target is aten.slice.Tensor:
        start, step = argument(node, "start"), argument(node, "step")
        return start in (0, None) and step == 1 and not isinstance(argument(node, "end"), SymInt)
    return False
