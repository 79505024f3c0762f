"""Ways to run a lowered graph, one a file."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvpass.backends.eager import run_eagerly
from kvpass.backends.torch_compile import CompiledGraph
from kvpass.ir.program import KVProgram

Runner = Callable[..., tuple[Tensor, ...]]


def make_runner(program: KVProgram, backend: str | Callable[..., Any], mode: str | None) -> Runner:
    """A callable over the tensors of `program.inputs`, in their order, that returns those of `program.outputs`."""
    if backend == "eager":
        if mode is not None:
            raise ValueError(f"mode={mode!r} is for torch.compile; backend='eager' runs the graph as it is")
        return run_eagerly(program)
    return CompiledGraph(program, backend, mode)


def streams_weights(backend: str | Callable[..., Any], device: torch.device) -> bool:
    """Whether weights are read faster as fused products and sums than by a matrix product, for a single token.

    So it is with inductor on a CPU: 43 against 19 GB/s in float32. A GPU's own products read at full speed.
    """
    return backend == "inductor" and device.type == "cpu"
