"""Ways to run a lowered graph, one a file."""

from collections.abc import Callable
from threading import Thread
from typing import Any

import torch
from torch import Tensor
from torch._inductor import cpu_vec_isa

from kvpass.backends.eager import run_eagerly
from kvpass.backends.engine_sizes import EngineSizes
from kvpass.backends.inductor import RegionalGraph, mode_options
from kvpass.backends.regions import can_cut
from kvpass.backends.torch_compile import CompiledGraph
from kvpass.errors import PackageError
from kvpass.ir.program import KVProgram

Runner = Callable[..., tuple[Tensor, ...]]
TENSORRT = "tensorrt"


def get_ready(backend: str | Callable[..., Any]) -> None:
    """Begin what a backend needs to know before it compiles and takes seconds to find out, beside the capture.

    Inductor compiles and loads a library for each kind of vector instructions that the CPU has.
    """
    if backend == "inductor" and not torch.cuda.is_available():
        Thread(target=cpu_vec_isa.valid_vec_isa_list, name="kvpass-get-ready", daemon=True).start()


def make_runner(
    program: KVProgram, backend: str | Callable[..., Any], mode: str | None, sizes: EngineSizes | None = None
) -> Runner:
    """A callable over the tensors of `program.inputs`, in their order, that returns those of `program.outputs`.

    sizes: for which an engine is built; of TensorRT alone.
    """
    if backend == "torch_tensorrt":
        raise PackageError("backend='torch_tensorrt' of torch.compile loses every write to the cache; take 'tensorrt'")
    if backend in ("eager", TENSORRT) and mode is not None:
        raise ValueError(f"mode={mode!r} is for torch.compile, not for backend={backend!r}")
    if backend == TENSORRT:
        from kvpass.backends.tensorrt.graph import EngineGraph  # here: it is optional, and large

        assert sizes is not None
        return EngineGraph(program, sizes)
    if backend == "eager":
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
