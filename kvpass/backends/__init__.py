"""Ways to run a lowered graph, one a file."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvpass.backends.eager import run_eagerly
from kvpass.backends.inductor import RegionalGraph, mode_options
from kvpass.backends.regions import can_cut
from kvpass.backends.torch_compile import CompiledGraph
from kvpass.errors import PackageError
from kvpass.ir.program import KVProgram

Runner = Callable[..., tuple[Tensor, ...]]


def make_runner(program: KVProgram, backend: str | Callable[..., Any], mode: str | None) -> Runner:
    """A callable over the tensors of `program.inputs`, in their order, that returns those of `program.outputs`."""
    if backend in ("tensorrt", "torch_tensorrt"):
        raise PackageError(
            f"backend={backend!r}: torch.compile would lose every write to the cache there; build engines with "
            "model.export(path, format='tensorrt')"
        )
    if backend == "eager":
        if mode is not None:
            raise ValueError(f"mode={mode!r} is for torch.compile; backend='eager' runs the graph as it is")
        return run_eagerly(program)
    if backend == "inductor" and can_cut(program):
        options = mode_options(mode)
        # A GPU replays a whole graph at once: pieces would be launched one by one.
        if not options.get("triton.cudagraphs") or not uses_cuda(program):
            return RegionalGraph(program, options)
    return CompiledGraph(program, backend, mode)


def uses_cuda(program: KVProgram) -> bool:
    return any(node.meta["val"].device.type == "cuda" for node in program.placeholders())


def streams_memory(backend: str | Callable[..., Any], device: torch.device) -> bool:
    """Whether weights and cache are read faster by fused products and sums than by library calls, for a single token.

    So it is with inductor on a CPU: 43 against 19 GB/s in float32 for weights. A GPU's libraries read at full speed.
    """
    return backend == "inductor" and device.type == "cpu"
