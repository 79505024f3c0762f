"""What a program assumes of the sizes of its inputs, tried for all prompts that it is for."""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.node import map_arg

aten = torch.ops.aten


def broken_assumption(program: ExportedProgram, lengths: Iterable[int]) -> str | None:
    """The first length of a prompt at which an assertion of the graph fails, and what it says.

    Torch checks them when it runs the program; other runtimes drop them, and would compute something else.
    """
    claims = {n.args[1]: n for n in program.graph.nodes if n.target is aten._assert_scalar.default}  # layers are alike
    given = set(program.graph_signature.user_inputs)
    tensors = _tensors(program)
    for tokens in lengths:
        value = _values(tensors, given, tokens)
        for claim in claims.values():
            if not value(claim.args[0]):
                return f"for {tokens} tokens: {claim.args[1]}"
    return None


def _values(tensors: Mapping[str, Any], given: Collection[object], tokens: int) -> Callable[[Any], Any]:
    """Values of nodes that follow from the number of tokens, all that varies of what is `given`, and own tensors."""
    known: dict[Node, Any] = {}

    def value(node: Any) -> Any:
        if not isinstance(node, Node):
            return node
        if node not in known:
            if node.op == "placeholder":
                known[node] = tensors[node.name]
            elif node.target is aten.sym_size.int and getattr(node.args[0], "name", None) in given:
                known[node] = tokens
            else:
                target: Any = node.target
                known[node] = target(*map_arg(node.args, value), **map_arg(node.kwargs, value))
        return known[node]

    return value


def _tensors(program: ExportedProgram) -> dict[str, Any]:
    """The program's own tensors by the names of their placeholders."""
    signature = program.graph_signature
    named = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    held = {**program.constants, **program.state_dict}
    return {placeholder: held[name] for placeholder, name in named.items()}
