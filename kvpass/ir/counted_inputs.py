"""Numbers that the host counts for every call, as inputs of a graph."""

from collections.abc import Mapping

import torch
from torch.fx import Node

from kvpass.ir.builder import GraphBuilder
from kvpass.ir.program import Port, Role

LETTERS = {"budget": "N"}  # how sizes are called in the text of a graph; others by their own name


def counted_inputs(
    builder: GraphBuilder, role: Role, examples: Mapping[str, float], least: Mapping[str, int], layer: int | None
) -> dict[str, Node]:
    """One input for each name, of one layer or (`None`) of all; those that are there already are used again.

    A size enters as the length of a tensor, so that it stays a size for the compiler; a scalar as f32[]. `examples`
    are values that the graph could meet, `least` the smallest ones where they are above 2.
    """
    program = builder.program
    device = program.input_node(Role.INPUT_IDS).meta["val"].device
    suffix = "" if layer is None else f"_{layer}"
    known = {str(node.target): node for node in program.placeholders()}
    found = {}
    for key, example in examples.items():
        name = key + suffix
        if name not in known:
            shape: tuple[object, ...] = ()
            if role is Role.SIZE:
                low = least.get(key, 2)
                shape = (program.shapes.dim(LETTERS.get(key, key) + suffix, hint=max(int(example), low), low=low),)
            value = program.shapes.empty(shape, torch.float32, device)  # type: ignore[arg-type]
            known[name] = builder.placeholder(Port(name, role, layer, key=key), value)
        found[key] = known[name]
    return found
