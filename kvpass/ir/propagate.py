"""Compute the fake value of every node of a graph."""

import operator
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from kvpass.ir.program import KVProgram
from kvpass.ir.subgraph import call
from kvpass.ir.symbols import SYMBOLIC


def propagate(program: KVProgram, inputs: Mapping[str, Tensor]) -> dict[Node, Any]:
    """The value of every node, given fake tensors for the placeholders; the graph is not changed."""
    values: dict[Node, Any] = {}
    with program.shapes.computing():
        for node in program.graph.nodes:
            if node.op == "placeholder":
                values[node] = inputs[str(node.target)]
            elif node.op == "get_attr":
                held = program.held(node)
                values[node] = program.shapes.fake(held) if isinstance(held, Tensor) else held
            elif node.op == "call_function":
                values[node] = call(node, values.__getitem__)
            elif node.op != "output":
                raise TypeError(f"node {node.name}: a program holds no {node.op!r} nodes")
    return values


def assign_values(program: KVProgram, inputs: Mapping[str, Tensor]) -> None:
    """Set `meta["val"]` of every node, and replace sizes that are constant by the constant."""
    for node, value in propagate(program, inputs).items():
        node.meta["val"] = value
    for node in reversed(program.graph.nodes):
        if node.op == "call_function" and isinstance(node.meta["val"], int | float | bool):
            for user in tuple(node.users):
                _replace_by_constant(user, node)
            program.graph.erase_node(node)


def _replace_by_constant(user: Node, size: Node) -> None:
    def constant(node: Node) -> Any:
        return size.meta["val"] if node is size else node

    user.args, user.kwargs = map_arg((user.args, user.kwargs), constant)


def refresh_values(program: KVProgram, changed: Iterable[Node]) -> None:
    """Recompute the values of nodes whose arguments have changed."""
    with program.shapes.computing():
        for node in sorted(changed):
            node.meta["val"] = call(node, lambda source: source.meta["val"])


def is_size(node: Node) -> bool:
    """Whether a node computes a symbolic size rather than a tensor."""
    return isinstance(node.meta.get("val"), SYMBOLIC) and node.target is not operator.getitem
