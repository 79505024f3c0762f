"""Compile a phase graph with inductor, region by region: what is equal in many layers is compiled once."""

import copy
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from threading import Thread
from typing import Any, TypeVar

import sympy
import torch
from torch import SymInt, Tensor
from torch.fx import Graph, GraphModule, Node

from kvpass.backends import blocked_attention
from kvpass.backends.huge_pages import gather_in_huge_pages
from kvpass.backends.onednn import multiply_with_onednn
from kvpass.backends.regions import Region, Regions, cut_regions
from kvpass.backends.replay import Buffers, Code, Replay, code_of
from kvpass.ir.kind import Kind
from kvpass.ir.program import STORED, KVProgram, Role
from kvpass.ir.symbols import Size, SymbolicShapes, expression

G = TypeVar("G", bound="Guarded")
REMEMBERED = 256  # combinations of sizes whose code is kept at hand
_shape_of = operator.attrgetter("shape")


def mode_options(mode: str | None) -> dict[str, Any]:
    """What a mode of torch.compile means to inductor; `RuntimeError` for an unknown one, as torch.compile has it."""
    return {} if mode is None else dict(torch._inductor.list_mode_options(mode))


@dataclass(frozen=True)
class Guarded:
    """What was found out for some sizes, good for all that `guards` allow, which call them n0, n1, ..."""

    guards: tuple[Any, ...]

    def allows(self, sizes: Sequence[int]) -> bool:
        values = {name: sympy.Integer(size) for name, size in zip(_names(sizes), sizes, strict=True)}
        return all(bool(guard.xreplace(values)) for guard in self.guards)


@dataclass(frozen=True)
class Piece(Guarded):
    """A compiled region; `code` is what it runs, where that can be replayed."""

    run: Callable[..., Sequence[Tensor]]
    code: Code | None = None


@dataclass(frozen=True)
class _Ready:
    """A graph for inputs of some shapes."""

    sizes: Mapping[Any, int]
    pieces: Sequence[Piece]
    run: Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Left(Guarded):
    """What kinds of tensors a region leaves, its sizes being n0, n1, ..."""

    kinds: tuple[Kind, ...]


class RegionalGraph:
    """One phase graph as straight-line code that calls compiled regions; regions that are equal share what is compiled.

    dynamo has no part in it: which code runs is decided by the sizes of the inputs, and checked against the guards of
    the compilations when sizes are new; strides are checked by the compiled code. Sizes of 0 and 1 are constants in it.
    """

    def __init__(self, program: KVProgram, options: Mapping[str, Any]) -> None:
        self.program, self.options, self.cut = program, options, cut_regions(program)
        self._inputs = list(program.placeholders())
        reads = dict.fromkeys(node for region in self.cut.regions for node in region.reads if node.op == "get_attr")
        self._weights = {node: program.attribute(node) for node in reads}
        weights = list(self._weights.values())  # while code is compiled, which has the time
        Thread(target=gather_in_huge_pages, args=(weights,), name="kvpass-huge-pages", daemon=True).start()
        self._where: dict[Any, tuple[int, int]] = {}  # input and axis that have a size; what is kept, read, stored
        rank = {Role.SIZE: 0} | dict.fromkeys(STORED, 2)
        for i, node in sorted(enumerate(self._inputs), key=lambda pair: rank.get(program.inputs[pair[0]].role, 1)):
            for axis, size in enumerate(node.meta["val"].shape):
                if isinstance(size, SymInt) and size.node.expr.is_Symbol:
                    self._where.setdefault(size.node.expr, (i, axis))
        self._pieces: dict[object, list[Piece]] = {}  # by the text of a region and the kinds that it reads
        self._left: dict[object, list[Left]] = {}  # by the same
        self._joined: dict[tuple[int, ...], Callable[..., tuple[Tensor, ...]]] = {}  # by the pieces in their order
        self._ready: dict[tuple[torch.Size, ...], _Ready] = {}

    @property
    def compiled(self) -> int:
        """How many pieces of code were compiled so far."""
        return sum(map(len, self._pieces.values()))

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self._for_shapes(tuple(map(_shape_of, inputs))).run(*inputs)

    def record(self, inputs: Sequence[Tensor]) -> Replay | None:
        """Run a step so that it can be replayed on the same cache; None, and nothing has run, if it cannot be.

        What is not of the cache is copied in at every replay.
        """
        ready = self._for_shapes(tuple(map(_shape_of, inputs)))
        if any(piece.code is None for piece in ready.pieces):
            return None
        copied = tuple(i for i, port in enumerate(self.program.inputs) if port.role not in STORED)
        with torch.inference_mode(False):  # else they could not be written to outside of it
            own = tuple(t.clone() if i in copied else t for i, t in enumerate(inputs))
        values = dict(zip(self._inputs, own, strict=True)) | self._weights
        for node in self.cut.views:
            values[node] = node.target(values[node.args[0]], *node.args[1:])  # type: ignore[index,operator]
        calls: list[Any] = []
        buffers, together = Buffers(), self._read_by_the_next(ready.pieces)
        for region, piece, near in zip(self.cut.regions, ready.pieces, together, strict=True):
            assert piece.code is not None
            run = piece.code.noting(calls, buffers.of(piece, apart=not near))
            found = run(*(ready.sizes[symbol] for symbol in region.sizes), *(values[node] for node in region.reads))
            values |= dict(zip(region.leaves, found, strict=True))
        outputs = tuple(values[node] for node in self.program.output_node().args[0])  # type: ignore[union-attr,index]
        return Replay(self, own, outputs, tuple(calls), copied)

    def _read_by_the_next(self, pieces: Sequence[Piece]) -> list[bool]:
        """For each region whether nobody reads what it leaves when its code runs for the second time after it."""
        last: dict[Node, int] = dict.fromkeys(self.program.output_node().all_input_nodes, len(pieces))
        for i, region in enumerate(self.cut.regions):
            for node in region.reads:
                last[node] = max(i, last.get(node, 0))
        found = []
        for i, region in enumerate(self.cut.regions):
            again = [j for j in range(i + 1, len(pieces)) if pieces[j] is pieces[i]][1:2]
            found.append(all(last.get(leaf, i) < j for j in again for leaf in region.leaves))
        return found

    def _for_shapes(self, shapes: tuple[torch.Size, ...]) -> "_Ready":
        if shapes not in self._ready:
            if len(self._ready) == REMEMBERED:
                self._ready.clear()
            sizes = {symbol: shapes[i][axis] for symbol, (i, axis) in self._where.items()}
            pieces = self._chosen(sizes)
            order = tuple(map(id, pieces))
            if order not in self._joined:
                self._joined[order] = _joined(self.program, self.cut, list(sizes), list(self._weights), pieces)
            run = partial(self._joined[order], tuple(sizes.values()), tuple(self._weights.values()))
            self._ready[shapes] = _Ready(sizes, pieces, run)
        return self._ready[shapes]

    def _chosen(self, sizes: Mapping[Any, int]) -> list[Piece]:
        """The code of each region, by the kinds of tensors that it reads from those before it."""
        constant = {symbol: sympy.Integer(size) for symbol, size in sizes.items() if size < 2}
        kinds = {node: Kind.contiguous(node.meta["val"]).replaced(constant) for node in self._inputs}
        kinds |= {node: Kind.of(tensor) for node, tensor in self._weights.items()}
        for node in self.cut.views:
            kinds[node] = _selected(kinds[node.args[0]], node.args[1])  # type: ignore[index,arg-type]
        distinct, pieces = _distinct(sizes), []
        for region in self.cut.regions:
            names = dict(zip(region.sizes, _names(region.sizes), strict=True))
            reads = tuple(kinds[node].replaced(names) for node in region.reads)
            own, hints = ([given[symbol] for symbol in region.sizes] for given in (sizes, distinct))
            key = (region.text, reads)
            compiled = partial(_compiled, region, reads=reads, options=self.options)
            pieces.append(_allowed(self._pieces.setdefault(key, []), own, hints, compiled))
            left = _allowed(self._left.setdefault(key, []), own, hints, partial(_left, region, reads=reads))
            back = {name: constant.get(symbol, symbol) for symbol, name in names.items()}
            kinds |= dict(zip(region.leaves, (kind.replaced(back) for kind in left.kinds), strict=True))
        return pieces


def _allowed(known: list[G], sizes: list[int], distinct: list[int], make: Callable[[Sequence[int]], G]) -> G:
    """That of the `known` ones which is good for these sizes, made if none is there."""
    for found in known:
        if found.allows(sizes):
            return found
    # Sizes that are equal by accident are taken for different ones, if the result can be used for both.
    for hints in (distinct, sizes):
        known.append(make(hints))
        if known[-1].allows(sizes):
            return known[-1]
    raise AssertionError(f"what was made for the sizes {sizes} does not allow them")


def _left(region: Region, hints: Sequence[int], *, reads: Sequence[Kind]) -> Left:
    inputs = _Inputs.of(hints, reads)
    with inputs.shapes.computing():
        kinds = tuple(Kind.of(tensor).replaced(inputs.names) for tensor in region.module(*inputs.values))
    # Equalities put other sizes into the result; that two sizes differ is asked for strides, and need not be true.
    return Left(tuple(guard for guard in inputs.guards() if isinstance(guard, sympy.Eq)), kinds)


def _compiled(region: Region, hints: Sequence[int], *, reads: Sequence[Kind], options: Mapping[str, Any]) -> Piece:
    inputs = _Inputs.of(hints, reads)
    module = copy.deepcopy(region.module)
    if all(kind.device.type == "cpu" for kind in reads):
        multiply_with_onednn(module.graph)
        if blocked_attention.pays():
            blocked_attention.attend_in_blocks(module.graph)
        module.recompile()
    with torch.no_grad():
        run = torch._inductor.compile(module, list(inputs.values), dict(options))
    return Piece(inputs.guards(), run, code_of(run))


@dataclass(frozen=True)
class _Inputs:
    """Symbolic inputs of a region: `values` are sizes, then tensors; `names` says n0, n1, ... for torch's symbols."""

    shapes: SymbolicShapes
    values: tuple[Any, ...]
    names: Mapping[Any, Any]

    @classmethod
    def of(cls, hints: Sequence[int], reads: Sequence[Kind]) -> "_Inputs":
        shapes = SymbolicShapes()
        sizes: list[Size] = [hint if hint < 2 else shapes.dim(f"n{i}", hint=hint) for i, hint in enumerate(hints)]
        there = dict(zip(_names(hints), map(expression, sizes), strict=True))
        tensors = [kind.replaced(there).fake(shapes) for kind in reads]
        return cls(shapes, (*sizes, *tensors), {value: name for name, value in there.items() if value.is_Symbol})

    def guards(self) -> tuple[Any, ...]:
        """What was taken of the sizes since."""
        return tuple(guard.expr.xreplace(self.names) for guard in self.shapes.shape_env.guards)


def _joined(
    program: KVProgram, cut: Regions, sizes: Sequence[Any], weights: Sequence[Node], pieces: Sequence[Piece]
) -> Callable[..., tuple[Tensor, ...]]:
    """Python code of one call after the other, which forgets what nobody will read.

    It takes numbers for the sizes, the weights, then what the program takes.
    """
    graph = Graph()
    numbers, tensors = graph.placeholder("sizes"), graph.placeholder("weights")
    new = {node: graph.placeholder(str(node.target)) for node in program.placeholders()}
    own: dict[Any, Node] = {
        symbol: graph.call_function(operator.getitem, (numbers, i)) for i, symbol in enumerate(sizes)
    }
    new |= {node: graph.call_function(operator.getitem, (tensors, i)) for i, node in enumerate(weights)}
    for node in cut.views:
        new[node] = graph.node_copy(node, new.__getitem__)
    for i, (region, piece) in enumerate(zip(cut.regions, pieces, strict=True)):
        inputs = [*(own[symbol] for symbol in region.sizes), *(new[node] for node in region.reads)]
        called = graph.call_function(_named(piece.run, f"region_{i}"), tuple(inputs))
        for place, leaf in enumerate(region.leaves):
            new[leaf] = graph.call_function(operator.getitem, (called, place))
    graph.output(tuple(new[node] for node in program.output_node().args[0]))  # type: ignore[union-attr,index]
    return GraphModule({}, graph).forward


def _named(run: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A function as fx can write it."""

    def region(*inputs: Any) -> Any:
        return run(*inputs)

    region.__name__ = region.__qualname__ = name
    return region


def _names(sizes: Sequence[Any]) -> list[Any]:
    return [sympy.Symbol(f"n{i}") for i in range(len(sizes))]


def _distinct(sizes: Mapping[Any, int]) -> dict[Any, int]:
    """The same sizes, those that were there before made larger."""
    found: dict[Any, int] = {}
    for symbol, size in sizes.items():
        while size > 1 and size in found.values():
            size += 1
        found[symbol] = size
    return found


def _selected(kind: Kind, axis: int) -> Kind:
    """A tensor without one of its axes."""
    shape, stride = ((*sizes[:axis], *sizes[axis + 1 :]) for sizes in (kind.shape, kind.stride))
    return Kind(shape, stride, kind.dtype, kind.device)
