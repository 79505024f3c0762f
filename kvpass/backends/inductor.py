"""Compile a phase graph with inductor, region by region: what is equal in many layers is compiled once."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import SymInt, Tensor
from torch.fx import Node

from kvpass.backends.onednn import multiply_with_onednn
from kvpass.backends.regions import Region, cut_regions
from kvpass.ir.program import KVProgram
from kvpass.ir.subgraph import call
from kvpass.ir.symbols import Size, SymbolicShapes, expression

REMEMBERED = 256  # combinations of sizes whose steps are kept at hand


def mode_options(mode: str | None) -> dict[str, Any]:
    """What a mode of torch.compile means to inductor; `RuntimeError` for an unknown one, as torch.compile has it."""
    return {} if mode is None else dict(torch._inductor.list_mode_options(mode))


@dataclass(frozen=True)
class Kind:
    """What code is compiled for: sizes and strides of a tensor as expressions, its dtype and device."""

    shape: tuple[Any, ...]
    stride: tuple[Any, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> "Kind":
        shape, stride = ([expression(size) for size in sizes] for sizes in (tensor.shape, tensor.stride()))
        return cls(tuple(shape), tuple(stride), tensor.dtype, tensor.device)

    def replaced(self, symbols: Mapping[Any, Any]) -> "Kind":
        shape, stride = (tuple(size.xreplace(symbols) for size in sizes) for sizes in (self.shape, self.stride))
        return Kind(shape, stride, self.dtype, self.device)


@dataclass(frozen=True)
class Version:
    """The compiled code of a region, good for sizes that `guards` allow."""

    run: Any
    guards: tuple[Any, ...]
    symbols: tuple[Any, ...]

    def allows(self, sizes: Sequence[int]) -> bool:
        values = {s: sympy.Integer(n) for s, n in zip(self.symbols, sizes, strict=True) if s.is_Symbol}
        return all(bool(guard.xreplace(values)) for guard in self.guards)


@dataclass
class Code:
    """All that is compiled for regions of one text and kinds of inputs; sizes of 0 and 1 are constants in it."""

    module: torch.fx.GraphModule
    kinds: tuple[Kind, ...]
    versions: list[Version]
    outputs: tuple[Kind, ...] = ()

    def version(self, sizes: Sequence[int], options: Mapping[str, Any]) -> Version:
        """The code for these sizes, compiled if none is there."""
        for version in self.versions:
            if version.allows(sizes):
                return version
        # Sizes that are equal by accident are compiled as different ones, if the code can be used for both.
        for hints in (_distinct(sizes), sizes):
            self.versions.append(self._compiled(hints, options))
            if self.versions[-1].allows(sizes):
                return self.versions[-1]
        raise AssertionError(f"what inductor compiled for the sizes {sizes} does not allow them")

    def _compiled(self, hints: Sequence[int], options: Mapping[str, Any]) -> Version:
        shapes = SymbolicShapes()
        symints: list[Size] = [hint if hint < 2 else shapes.dim(f"z{i}", hint=hint) for i, hint in enumerate(hints)]
        local = {sympy.Symbol(f"z{i}"): expression(size) for i, size in enumerate(symints)}
        inputs = [_fake(kind.replaced(local), shapes) for kind in self.kinds]
        if not self.outputs:
            with shapes.computing():
                left = self.module(*symints, *inputs)
            back = {value: name for name, value in local.items() if value.is_Symbol}
            self.outputs = tuple(Kind.of(tensor).replaced(back) for tensor in left)
        module = copy.deepcopy(self.module)
        if all(kind.device.type == "cpu" for kind in self.kinds):
            names = [node.name for node in module.graph.nodes if node.op == "placeholder"][len(hints) :]
            multiply_with_onednn(module.graph, {name: k.dtype for name, k in zip(names, self.kinds, strict=True)})
            module.recompile()
        with torch.no_grad():
            run = torch._inductor.compile(module, [*symints, *inputs], dict(options))
        return Version(run, tuple(guard.expr for guard in shapes.shape_env.guards), tuple(local.values()))


def _distinct(sizes: Sequence[int]) -> list[int]:
    """The same sizes, those that were there before made larger."""
    found: list[int] = []
    for size in sizes:
        while size > 1 and size in found:
            size += 1
        found.append(size)
    return found


def _fake(kind: Kind, shapes: SymbolicShapes) -> Tensor:
    def made(expr: Any) -> Size:
        return int(expr) if expr.is_Integer else shapes.shape_env.create_symintnode(expr, hint=None)

    with shapes.fake_mode:
        shape, stride = ([made(size) for size in sizes] for sizes in (kind.shape, kind.stride))
        return torch.empty_strided(shape, stride, dtype=kind.dtype, device=kind.device)


@dataclass(frozen=True)
class Step:
    """One region in its turn: `arguments` with the weights in it, the others come from slots."""

    arguments: tuple[Any, ...]
    reads: tuple[tuple[int, int], ...]  # (place among the arguments, slot)
    run: Any
    leaves: tuple[int, ...]  # slots
    last_read: tuple[int, ...]  # slots that nobody reads behind this step


class RegionalGraph:
    """One phase graph as a sequence of compiled regions.

    What was compiled is chosen by the sizes of the inputs, and checked against the guards of the compilation when sizes
    are new; strides are checked by the compiled code.
    """

    def __init__(self, program: KVProgram, options: Mapping[str, Any]) -> None:
        cut = cut_regions(program)
        self.program, self.regions, self.options = program, cut.regions, options
        self.codes: dict[object, Code] = {}
        self._inputs = list(program.placeholders())
        self._views = cut.views
        self._slots = {node: slot for slot, node in enumerate([*self._inputs, *cut.views])}
        for region in cut.regions:
            for leaf in region.leaves:
                self._slots[leaf] = len(self._slots)
        self._outputs = [self._slots[node] for node in program.output_node().args[0]]  # type: ignore[union-attr,index]
        self._where: dict[Any, tuple[int, int]] = {}  # input and axis that have a size
        for i, node in enumerate(self._inputs):
            for axis, size in enumerate(node.meta["val"].shape):
                if isinstance(size, SymInt) and size.node.expr.is_Symbol:
                    self._where.setdefault(size.node.expr, (i, axis))
        self._plans: dict[tuple[int | None, ...], list[Code]] = {}
        self._ready: dict[tuple[int, ...], list[Step]] = {}

    @property
    def compiled(self) -> int:
        """How many pieces of code were compiled so far."""
        return sum(len(code.versions) for code in self.codes.values())

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        sizes = tuple(inputs[i].shape[axis] for i, axis in self._where.values())
        steps = self._ready.get(sizes)
        if steps is None:
            if len(self._ready) == REMEMBERED:
                self._ready.clear()
            steps = self._ready[sizes] = self._prepared(dict(zip(self._where, sizes, strict=True)))
        values: list[Any] = [*inputs, *[None] * (len(self._slots) - len(inputs))]
        for node in self._views:
            values[self._slots[node]] = call(node, lambda source: values[self._slots[source]])
        for step in steps:
            arguments = list(step.arguments)
            for place, slot in step.reads:
                arguments[place] = values[slot]
            left = step.run(*arguments)
            for slot in step.last_read:
                values[slot] = None
            for slot, value in zip(step.leaves, left, strict=True):
                values[slot] = value
        return tuple(values[slot] for slot in self._outputs)

    def _prepared(self, sizes: Mapping[Any, int]) -> list[Step]:
        """The regions with code for these sizes."""
        fixed = tuple(size if size < 2 else None for size in sizes.values())
        if fixed not in self._plans:
            self._plans[fixed] = self._planned(sizes)
        last = {slot: i for i, region in enumerate(self.regions) for slot in self._read_slots(region)}
        steps = []
        for i, (region, code) in enumerate(zip(self.regions, self._plans[fixed], strict=True)):
            own = [sizes[symbol] for symbol in region.sizes]
            weights = [self.program.attribute(node) if node.op == "get_attr" else None for node in region.reads]
            places = {place: node for place, node in enumerate(region.reads, len(own)) if node in self._slots}
            steps.append(
                Step(
                    (*own, *weights),
                    tuple((place, self._slots[node]) for place, node in places.items()),
                    code.version(own, self.options).run,
                    tuple(self._slots[leaf] for leaf in region.leaves),
                    tuple(slot for slot, step in last.items() if step == i and slot not in self._outputs),
                )
            )
        return steps

    def _planned(self, sizes: Mapping[Any, int]) -> list[Code]:
        """The code of each region, by what it reads from those before it; sizes of 0 and 1 are constants."""
        constant = {symbol: sympy.Integer(size) for symbol, size in sizes.items() if size < 2}
        kinds = {node: self._contiguous(node).replaced(constant) for node in self._inputs}
        for node in self._views:
            kinds[node] = _selected(kinds[node.args[0]], node.args[1])  # type: ignore[index,arg-type]
        codes = []
        for region in self.regions:
            codes.append(self._code(region, kinds))
            codes[-1].version([sizes[symbol] for symbol in region.sizes], self.options)
            names = {sympy.Symbol(f"z{n}"): constant.get(symbol, symbol) for n, symbol in enumerate(region.sizes)}
            left = (kind.replaced(names) for kind in codes[-1].outputs)
            kinds |= dict(zip(region.leaves, left, strict=True))
        return codes

    def _read_slots(self, region: Region) -> list[int]:
        return [self._slots[node] for node in region.reads if node in self._slots]

    def _code(self, region: Region, kinds: Mapping[Node, Kind]) -> Code:
        """What is compiled for this region and others like it."""
        names = {symbol: sympy.Symbol(f"z{n}") for n, symbol in enumerate(region.sizes)}
        read = tuple(
            Kind.of(self.program.attribute(node)) if node.op == "get_attr" else kinds[node].replaced(names)
            for node in region.reads
        )
        return self.codes.setdefault((region.text, read), Code(region.module, read, []))

    def _contiguous(self, node: Node) -> Kind:
        value = node.meta["val"]
        shape = tuple(expression(size) for size in value.shape)
        stride = tuple(sympy.Mul(*shape[axis + 1 :]) for axis in range(len(shape)))
        return Kind(shape, stride, value.dtype, value.device)


def _selected(kind: Kind, axis: int) -> Kind:
    """A tensor without one of its axes."""
    shape, stride = ((*sizes[:axis], *sizes[axis + 1 :]) for sizes in (kind.shape, kind.stride))
    return Kind(shape, stride, kind.dtype, kind.device)
