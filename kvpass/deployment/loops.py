"""Loops of a graph in the form in which torch.export takes them a second time."""

from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from kvpass.ir.program import KVProgram

WHILE = torch.ops.higher_order.while_loop


def retraceable(program: KVProgram) -> KVProgram:
    """The program, or a copy in which loops are given no plain numbers: torch.export has no value for those.

    A size that the loop reads is a symbol in the program, but a number once it is exported for a fixed batch size.
    """
    if not any(node.target is WHILE for node in program.graph.nodes):
        return program
    program = program.copy()
    for node in program.graph.nodes:
        if node.target is WHILE:
            node.target = _loop
    program.graph_module.recompile()
    return program


def _loop(unfinished: GraphModule, step: GraphModule, carried: tuple[Any, ...], given: tuple[Any, ...]) -> Any:
    """The loop, with the numbers among those `given` written into its bodies."""
    numbers = {len(carried) + index: value for index, value in enumerate(given) if isinstance(value, int | float)}
    bodies = [_with_numbers(body, numbers) for body in (unfinished, step)]
    return WHILE(*bodies, carried, tuple(value for value in given if not isinstance(value, int | float)))


def _with_numbers(body: GraphModule, numbers: dict[int, Any]) -> GraphModule:
    graph, values = Graph(), dict[Node, Any]()
    inputs = [node for node in body.graph.nodes if node.op == "placeholder"]
    for node in body.graph.nodes:
        if node.op == "placeholder" and inputs.index(node) in numbers:
            values[node] = numbers[inputs.index(node)]
        elif node.op == "output":
            graph.output(torch.fx.map_arg(node.args[0], values.__getitem__))
        else:
            values[node] = copied = graph.node_copy(node, values.__getitem__)
            copied.target = _loop if node.target is WHILE else node.target
    return GraphModule(body, graph)
