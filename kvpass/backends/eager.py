"""Run the graph node by node: for tests and for looking at it, nothing is compiled."""

from collections.abc import Callable

from torch import Tensor

from kvpass.ir.program import KVProgram


def run_eagerly(program: KVProgram) -> Callable[..., tuple[Tensor, ...]]:
    """The graph itself, as Python calls of its operators."""
    run: Callable[..., tuple[Tensor, ...]] = program.graph_module.forward
    return run
