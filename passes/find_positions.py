"""Let positions come from outside where a module counts them itself."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from kvpass.ir.builder import GraphBuilder
from kvpass.ir.form import Form
from kvpass.ir.program import KVProgram, Role
from kvpass.ir.subgraph import argument
from kvpass.pass_manager import Pass

aten = torch.ops.aten
COUNTS = (aten.arange.default, aten.arange.start, aten.arange.start_step)


@dataclass(frozen=True)
class FindPositions(Pass):
    """In a module whose forward takes token ids alone, replace 0..S-1 by `position_ids`, and table rows by lookups.

    before:  arange: i64[S] = arange(S)
             slice_3: f32[S, 8] = slice(cos_table, 0, 0, S)
    after:   positions: i64[S] = select(position_ids, 0, 0)
             lookup: f32[S, 8] = index_select(cos_table, 0, positions)

    Behind a compressed prompt a token is one of its own, at a position that the module cannot count. Whether all
    places were found is proved by `prove-token-local`.
    """

    name: ClassVar[str] = "find-positions"
    requires: ClassVar[Form] = Form.CAPTURED
    produces: ClassVar[Form] = Form.CAPTURED

    def run(self, program: KVProgram) -> int:
        given = program.input_node(Role.POSITION_IDS)
        if given.users:
            return 0
        counts = [node for node in program.graph.nodes if self._counts(program, node)]
        rows = [node for node in program.graph.nodes if self._rows(program, node)]
        builder = GraphBuilder(program, self.name)
        replacements = {node: self._positions for node in counts} | {node: self._lookup for node in rows}
        for node, replacement in replacements.items():
            node.replace_all_uses_with(replacement(builder, node, given))
            program.graph.erase_node(node)
        return len(replacements)

    def _counts(self, program: KVProgram, node: Node) -> bool:
        """Whether a node is 0, 1, ..., S-1."""
        if node.target not in COUNTS or program.shapes.text(node.meta["val"].shape[0]) != "S":
            return False
        start, step = (node.args[0] if len(node.args) > 1 else 0), (node.args[2] if len(node.args) > 2 else 1)
        return bool(start == 0 and step == 1)

    def _rows(self, program: KVProgram, node: Node) -> bool:
        """Whether a node is the first S rows of a table that the module holds, or of such rows."""
        if node.target is not aten.slice.Tensor or argument(node, "start") not in (0, None):
            return False
        source, axis = node.args[0], argument(node, "dim")
        assert isinstance(source, Node) and isinstance(axis, int)
        is_table = source.op == "get_attr" or (source.op == "call_function" and self._is_constant(source))
        return is_table and program.shapes.text(node.meta["val"].shape[axis]) == "S"

    def _is_constant(self, node: Node) -> bool:
        """Whether it is computed from what the module holds alone, sizes aside."""
        tensors = [n for n in node.all_input_nodes if isinstance(n.meta["val"], Tensor)]
        return bool(tensors) and all(n.op == "get_attr" or self._is_constant(n) for n in tensors)

    def _positions(self, builder: GraphBuilder, node: Node, given: Node) -> Node:
        dtype = node.meta["val"].dtype

        def positions(position_ids: Tensor) -> Tensor:
            return position_ids[0].to(dtype)

        (found,) = builder.inline(positions, [given], names=["positions"], like=node)
        return found

    def _lookup(self, builder: GraphBuilder, node: Node, given: Node) -> Node:
        source, axis = node.args[0], argument(node, "dim")
        assert isinstance(source, Node) and isinstance(axis, int)

        def lookup(table: Tensor, position_ids: Tensor) -> Tensor:
            return table.index_select(axis, position_ids[0])

        (found,) = builder.inline(lookup, [source, given], names=["lookup"], like=node)
        return found
