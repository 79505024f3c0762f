"""Compute the fake value of every node of a graph."""

import operator
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.fx.node import map_arg

from kvpass.ir.program import KVProgram
from kvpass.ir.subgraph import call
from kvpass.ir.symbols import SYMBOLIC, SymbolicShapes, expression


def propagate(program: KVProgram, inputs: Mapping[str, Tensor]) -> dict[Node, Any]:
    """The value of every node, given fake tensors for the placeholders; the graph is not changed."""
    values: dict[Node, Any] = {}
    compute = _Memory(program.shapes)
    with program.shapes.computing():
        for node in program.graph.nodes:
            if node.op == "placeholder":
                values[node] = inputs[str(node.target)]
            elif node.op == "get_attr":
                held = program.held(node)
                values[node] = program.shapes.fake(held) if isinstance(held, Tensor) else held
            elif node.op == "call_function":
                values[node] = compute(node, values.__getitem__)
            elif node.op != "output":
                raise TypeError(f"node {node.name}: a program holds no {node.op!r} nodes")
    return values


class _Memory:
    """Computes a value as `call` does, once for all nodes that do the same on equal shapes: layers are alike."""

    def __init__(self, shapes: SymbolicShapes) -> None:
        self._shapes = shapes
        self._known: dict[Hashable, Tensor] = {}

    def __call__(self, node: Node, value_of: Callable[[Node], Any]) -> Any:
        args, kwargs = map_arg((node.args, node.kwargs), value_of)
        key = (node.target, _described(args), _described(kwargs))
        if (known := self._known.get(key)) is not None:
            return self._shapes.twin(known)
        value = call(node, value_of)
        if isinstance(value, Tensor) and _is_plain(value):
            self._known[key] = value
        return value


def _described(value: Any) -> Hashable:
    """What the shape of an operator's result depends on."""
    if isinstance(value, Tensor):
        kind = (value.dtype, value.device, value.is_conj(), value.is_neg())
        return (*kind, *map(expression, (*value.shape, *value.stride(), value.storage_offset())))
    if isinstance(value, list | tuple):
        return (type(value), *map(_described, value))
    if isinstance(value, dict):
        return tuple((key, _described(part)) for key, part in value.items())
    if isinstance(value, SYMBOLIC):
        return (type(value), value.node.expr)
    return (type(value), value) if isinstance(value, Hashable) else (type(value), id(value))


def _is_plain(value: Tensor) -> bool:
    """Whether sizes, strides and type say all about it; sizes that only data can tell are others each time."""
    if value.storage_offset() != 0 or value.is_conj() or value.is_neg() or value.layout is not torch.strided:
        return False
    return not any(free_unbacked_symbols(size) for size in value.shape if isinstance(size, SymInt))


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
