"""Repeat the kernel calls of a step without the Python around them.

What inductor writes for a region is Python that checks strides, allocates some twenty buffers, takes views of them and
calls one kernel. For thirty layers of a small model that is a tenth to a fifth of a decode step, and the same at every
token: neither the cache nor the buffers need to be others. So the kernels of one step are noted with what they were
called with, and called again, as a CUDA graph does for a GPU.
"""

import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._inductor.output_code import CompiledFxGraph

Kernel = Callable[..., Any]
Key = tuple[object, ...]
# What the Python of a region may do beside calling kernels: none of it has a result that a kernel does not fill in.
ALLOCATE = "empty_strided_cpu"
HARMLESS = {ALLOCATE, "assert_alignment", "assert_size_stride", "clear", "reinterpret_tensor", "torch"} | {
    str(dtype).removeprefix("torch.") for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)
}
DEPTH = 12  # of torch's wrappers around what inductor wrote


@dataclass(frozen=True)
class Code:
    """The Python that inductor wrote for a region, where all that it computes is computed by kernels of its own."""

    call: Any  # function or method of a list of inputs, which it empties
    kernels: tuple[str, ...]  # names among its globals

    def noting(self, calls: list[tuple[Kernel, tuple[Any, ...]]], allocate: Callable[..., Tensor]) -> Kernel:
        """The same as a function that also notes its kernel calls, and has its buffers from `allocate`."""

        def noted(kernel: Kernel) -> Kernel:
            def run(*args: Any) -> None:
                calls.append((kernel, args))
                kernel(*args)

            return run

        function = getattr(self.call, "__func__", self.call)
        own = {name: noted(function.__globals__[name]) for name in self.kernels}
        twin = types.FunctionType(function.__code__, {**function.__globals__, **own, ALLOCATE: allocate})
        bound = types.MethodType(twin, self.call.__self__) if function is not self.call else twin
        return lambda *inputs: bound(list(inputs))


def code_of(compiled: object) -> Code | None:
    """The code behind what `torch._inductor.compile` returned; None if it does anything but call its kernels."""
    found = next((part for part in _behind(compiled) if isinstance(part, CompiledFxGraph)), None)
    call = None if found is None else found.current_callable
    function = getattr(call, "__func__", call)
    if not isinstance(function, types.FunctionType) or function.__closure__:
        return None
    names = set(function.__code__.co_names) - HARMLESS
    kernels = tuple(sorted(name for name in names if _is_kernel(function.__globals__.get(name))))
    return Code(call, kernels) if names == set(kernels) else None


def _is_kernel(value: object) -> bool:
    """A function of a library that inductor compiled."""
    return isinstance(value, types.BuiltinFunctionType) and value.__name__ == "kernel"


def _behind(function: object) -> Iterator[object]:
    """What a function refers to, directly or through others, the nearest first."""
    level, seen = [function], {id(function)}
    for _ in range(DEPTH):
        found = [part for one in level for part in _parts(one) if id(part) not in seen]
        yield from found
        seen |= set(map(id, found))
        level = found


def _parts(one: object) -> Iterator[object]:
    """What can be called of what a function, method or object holds."""
    held = [one.__self__] if isinstance(one, types.MethodType) else []
    for cell in getattr(one, "__closure__", None) or ():
        with suppress(ValueError):  # nothing is in it yet
            held.append(cell.cell_contents)
    held += getattr(one, "__dict__", {}).values()
    yield from (part for part in held if callable(part) and not isinstance(part, type))


@dataclass(frozen=True)
class Replay:
    """The kernel calls of a step; `inputs` are the tensors that they read and write, `outputs` what they leave."""

    graph: object  # whose step it is
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    calls: tuple[tuple[Kernel, tuple[Any, ...]], ...]
    copied: tuple[int, ...]  # places of inputs that are copied in at every call

    def serves(self, graph: object, inputs: Sequence[Tensor]) -> bool:
        """Whether this is its graph, and these its tensors, or of their size where they are copied."""
        return (
            graph is self.graph
            and len(inputs) == len(self.inputs)
            and all(
                given is own or (place in self.copied and given.shape == own.shape)
                for place, (given, own) in enumerate(zip(inputs, self.inputs, strict=True))
            )
        )

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        for place in self.copied:
            self.inputs[place].copy_(inputs[place])
        for kernel, args in self.calls:
            kernel(*args)
        return self.left()

    def left(self) -> tuple[Tensor, ...]:
        """Copies of what the last run left."""
        return tuple(output.clone() for output in self.outputs)


class Buffers:
    """Memory for the intermediate results of a step: two sets for each piece of code, used in turns.

    What one region leaves is read by the next one, which may be the same code.
    """

    def __init__(self) -> None:
        self._held: dict[Key, Tensor] = {}
        self._turns: dict[int, int] = {}

    def of(self, piece: object, *, apart: bool) -> Callable[..., Tensor]:
        """An allocator for the next run of a piece; `apart`: what it leaves is read later than by the next region."""
        turn = self._turns[id(piece)] = self._turns.get(id(piece), -1) + 1
        count = 0

        def allocate(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            nonlocal count
            count += 1
            key = (id(piece), count, turn if apart else turn % 2, apart, size, stride, dtype)
            if key not in self._held:
                self._held[key] = torch.empty_strided(size, stride, dtype=dtype)
            return self._held[key]

        return allocate
