"""What a program assumes of the sizes of its inputs, tried for all prompts that it is for."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.node import map_arg

aten = torch.ops.aten


def broken_assumption(program: ExportedProgram, lengths: Iterable[int]) -> str | None:
    """The first length of `input_ids` at which an assertion of the graph fails, and what it says.

    Torch checks them when it runs the program; other runtimes drop them, and would compute something else.
    """
    claims = [node for node in program.graph.nodes if node.target is aten._assert_scalar.default]
    for tokens in lengths:
        value = _values(program, tokens)
        for claim in claims:
            if not value(claim.args[0]):
                return f"for {tokens} tokens: {claim.args[1]}"
    return None


def _values(program: ExportedProgram, tokens: int) -> Callable[[Any], Any]:
    """Values of nodes that follow from the number of tokens and from the program's own tensors."""
    signature = program.graph_signature
    owned = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    tensors = {**program.constants, **program.state_dict}
    known: dict[Node, Any] = {}

    def value(node: Any) -> Any:
        if not isinstance(node, Node):
            return node
        if node not in known:
            if node.op == "placeholder":
                known[node] = tensors[owned[node.name]]
            elif node.target is aten.sym_size.int and node.args == (_ids(program), 1):
                known[node] = tokens
            else:
                target: Any = node.target
                known[node] = target(*map_arg(node.args, value), **map_arg(node.kwargs, value))
        return known[node]

    return value


def _ids(program: ExportedProgram) -> Node:
    (ids,) = [node for node in program.graph.nodes if node.op == "placeholder" and node.name == "input_ids"]
    found: Node = ids
    return found
