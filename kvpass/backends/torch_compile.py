"""Run the graph through torch.compile, with inductor or any other backend that torch.compile takes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import SymInt, Tensor

from kvpass.ir.program import KVProgram


class CompiledGraph:
    """One phase graph, compiled at its first call; sizes that are symbolic in the program stay dynamic."""

    def __init__(self, program: KVProgram, backend: str | Callable[..., Any], mode: str | None) -> None:
        self._dynamic = [
            [axis for axis, size in enumerate(node.meta["val"].shape) if isinstance(size, SymInt)]
            for node in program.placeholders()
        ]
        self._run = torch.compile(program.graph_module, backend=backend, mode=mode, fullgraph=True)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        for tensor, axes in zip(inputs, self._dynamic, strict=True):
            # Buffers of the cache live through many calls and graphs, and are marked once. A size of 1 is compiled as
            # such, also where it is none in another graph: so all graphs mark the same axes of a buffer.
            dynamic = [axis for axis in axes if tensor.shape[axis] != 1]
            if dynamic and not hasattr(tensor, "_dynamo_weak_dynamic_indices"):
                torch._dynamo.maybe_mark_dynamic(tensor, dynamic)
        outputs: tuple[Tensor, ...] = self._run(*inputs)
        return outputs
