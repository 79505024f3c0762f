"""Cut a lowered graph into regions, about one a decoder layer, so that equal ones are compiled once."""

import functools
import itertools
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import SymInt, Tensor
from torch.fx import Graph, GraphModule, Node, Proxy
from torch.fx.node import map_arg
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from kvpass.ir.program import KVProgram, Origin, Role
from kvpass.ir.subgraph import nodes_between
from kvpass.ir.symbols import SYMBOLIC, expression, symbols_in

aten = torch.ops.aten
ATTENTION = aten.scaled_dot_product_attention.default
PARTING = 2**31
FACTORIES = frozenset(
    [
        aten.arange.default,
        aten.arange.start,
        aten.full.default,
        aten.zeros.default,
        aten.ones.default,
        aten.new_zeros.default,
    ]
)


@dataclass(frozen=True)
class Region:
    """Neighbouring nodes of a program as a graph of their own; its inputs are `sizes`, then `reads`.

    `sizes` are symbols of the program, `reads` and `leaves` nodes of it. Regions with the same `text` compute the same
    of their inputs, and have one graph. `held` are the bodies of its loops.
    """

    graph: Graph
    held: Mapping[str, Any]
    sizes: tuple[Any, ...]
    reads: tuple[Node, ...]
    leaves: tuple[Node, ...]
    text: str

    @functools.cached_property
    def module(self) -> GraphModule:
        """Made when it is asked for: of many regions that are equal one is compiled."""
        return GraphModule(dict(self.held), self.graph)


@dataclass(frozen=True)
class Regions:
    """A program in pieces: `views` of its inputs are taken first, then the regions follow each other."""

    views: tuple[Node, ...]
    regions: tuple[Region, ...]


def cut_regions(program: KVProgram) -> Regions:
    """Cut between layers where the fewest values are alive: that is the residual stream.

    Constants of sizes (ranges, masks of a window) and of weights (casts) are computed in each region that reads them.
    """
    cutter = _Cutter(program)
    return Regions(tuple(cutter.views), tuple(cutter.regions()))


def can_cut(program: KVProgram) -> bool:
    """Whether all sizes are those of inputs; some are known by the data alone (tokens of an expert)."""
    known = {symbol for node in program.placeholders() for symbol in symbols_in(node.meta["val"])}
    values = (node.meta.get("val") for node in program.graph.nodes if node.op == "call_function")
    tensors = (t for value in values for t in (value if isinstance(value, list | tuple) else [value]))
    return all(symbol in known for tensor in tensors if tensor is not None for symbol in symbols_in(tensor))


class _Cutter:
    def __init__(self, program: KVProgram) -> None:
        self.program = program
        inputs = set(program.placeholders())
        self.views = [
            node
            for node in program.graph.nodes
            if node.target is aten.select.int and set(node.all_input_nodes) <= inputs
        ]
        self.anywhere: set[Node] = set()
        for node in program.graph.nodes:
            if _is_cheap_constant(program, node, self.anywhere):
                self.anywhere.add(node)
        apart = {*self.views, *self.anywhere}
        self.body = [node for node in program.graph.nodes if node.op == "call_function" and node not in apart]
        self.index = {node: i for i, node in enumerate(self.body)}
        self.written: dict[tuple[int, int], Region] = {}

    def regions(self) -> Iterator[Region]:
        alike: dict[str, Region] = {}
        for first, last in itertools.pairwise(self._bounds()):
            region = self.region(first, last)
            known = alike.setdefault(region.text, region)
            yield replace(region, graph=known.graph, held=known.held, text=known.text)

    # -- where to cut ------------------------------------------------------------------------------------------

    def _bounds(self) -> list[int]:
        """Indices into the body where regions begin, and its end."""
        places = self._layers()
        alive = self._alive()
        inner = [
            min(range(after + 1, before + 1), key=lambda i: (alive[i], -i))
            for after, before in itertools.pairwise(places)
        ]
        bounds = [0, *inner, len(self.body)]
        if len(inner) < 2:
            return bounds
        texts = {self.region(first, last).text for first, last in itertools.pairwise(inner)}
        lengths = sorted({last - first for first, last in itertools.pairwise(inner)})
        # What stands before the first layer and behind the last one: where a piece as long as another layer equals it.
        leads = sorted({place - cut for place, cut in zip(places[1:], inner, strict=True)})
        starts = [i for i in (places[0] - lead for lead in leads) if i > 0 and alive[i] < PARTING]
        head = [i for i in starts if self.region(i, inner[0]).text in texts][:1]
        ends = [i for i in (inner[-1] + length for length in lengths) if i < len(self.body) and alive[i] < PARTING]
        tail = [i for i in ends if self.region(inner[-1], i).text in texts][:1]
        return [0, *head, *inner, *tail, len(self.body)]

    def _layers(self) -> list[int]:
        """Where each layer writes its keys; where it attends, if it reads those of another one."""
        ports = {port.name: port.layer for port in self.program.inputs if port.role is Role.KEYS}
        caches = [node for node in self.program.placeholders() if node.target in ports]
        places = [min(self.index[user] for user in node.users if user in self.index) for node in caches]
        others: dict[int, int] = {}
        for i, node in enumerate(self.body):
            made, site = node.meta.get("kvpass"), node.meta.get("site")
            layer = made.layer if isinstance(made, Origin) else site and site.layer
            if layer is not None and layer not in ports.values():
                others.setdefault(layer, i)
        return sorted([*places, *others.values()])

    def _alive(self) -> list[int]:
        """How many values are computed before an index of the body and read behind it, by the index.

        PARTING, where a cut would part an operator from one of its results.
        """
        changes = [0] * (len(self.body) + 2)
        for i, node in enumerate(self.body):
            readers = [self.index[user] for user in node.users if user in self.index]
            if readers and not _writes(node):
                changes[i + 1] += 1
                changes[max(readers) + 1] -= 1
        alive = list(itertools.accumulate(changes))
        for i, node in enumerate(self.body):
            if node.target is operator.getitem:
                operation = self.index[node.args[0]]
                alive[operation + 1 : i + 1] = [PARTING] * (i - operation)
        return alive

    # -- a piece -----------------------------------------------------------------------------------------------

    def region(self, first: int, last: int) -> Region:
        if (first, last) not in self.written:
            self.written[first, last] = _Writer(self.program, self.body[first:last], self.anywhere).region()
        return self.written[first, last]


class _Writer:
    """Writes the graph of one region."""

    def __init__(self, program: KVProgram, nodes: Sequence[Node], anywhere: set[Node]) -> None:
        self.program, self.nodes, self.anywhere = program, nodes, anywhere
        self.graph = Graph()
        self.held: dict[str, Any] = {}
        self.new: dict[Node, Node] = {}
        self.inside = set(nodes)
        self.reads: list[Node] = []
        self.sizes: dict[Any, Node] = {}

    def region(self) -> Region:
        self._declare()
        for node in self._attention_first():
            self._copy(node)
        at_home = self.inside | self.anywhere  # what only measures a tensor reads nothing of it
        read = (node for node in self.nodes if any(user not in at_home for user in node.users))
        leaves = tuple(node for node in read if not _writes(node))
        self.graph.output(tuple(self.new[node] for node in leaves))
        return Region(self.graph, self.held, tuple(self.sizes), tuple(self.reads), leaves, self._text())

    def _attention_first(self) -> list[Node]:
        """The nodes in an order in which attention is as early as it can be.

        It decides how queries and keys lie in memory; a press in front of it would have them in two ways.
        """
        early = set(nodes_between([n for n in self.nodes if n.target is ATTENTION], []))
        if any(_writes(node) for node in early):
            return list(self.nodes)
        return [*(n for n in self.nodes if n in early), *(n for n in self.nodes if n not in early)]

    def _source(self, node: Node) -> Node:
        """What a region reads for a node: where another region has written, the tensor that it wrote to."""
        while node not in self.inside and _writes(node):
            node = node.args[0]  # type: ignore[assignment]
        return node

    def _declare(self) -> None:
        """Placeholders for the sizes and for the tensors that come from elsewhere, in the order of their first use."""
        needed: dict[Node, None] = {}
        work = list(reversed(self.nodes))
        seen: set[Node] = set()
        while work:
            node = work.pop()
            for source in map(self._source, node.all_input_nodes):
                if source in self.inside or source in seen:
                    continue
                seen.add(source)
                needed[source] = None
                if source in self.anywhere and not _measures(source):
                    work.append(source)
        self.reads = [
            node
            for node in needed
            if node not in self.anywhere and not isinstance(_held(self.program, node), GraphModule)
        ]
        for node in (*self.reads, *(node for node in needed if node in self.anywhere)):
            for symbol in symbols_in(node.meta["val"]):
                self.sizes.setdefault(symbol, None)  # type: ignore[arg-type]
        for i, symbol in enumerate(self.sizes):
            self.sizes[symbol] = self.graph.placeholder(f"size_{i}")
        for i, node in enumerate(self.reads):
            self.new[node] = self.graph.placeholder(f"read_{i}")

    def _copied(self, node: Node) -> Node:
        """The node of this graph that stands for one of the program's."""
        if node not in self.new:
            if node.op == "get_attr":  # the body of a loop
                name = f"body_{len(self.held)}"
                self.held[name] = self.program.held(node)
                self.new[node] = self.graph.get_attr(name)
            elif _measures(node):
                self.new[node] = self._size(node)
            else:
                self._copy(node)
        return self.new[node]

    def _copy(self, node: Node) -> None:
        """Under a name that says nothing of where it stood."""
        args, kwargs = map_arg((node.args, node.kwargs), lambda source: self._copied(self._source(source)))
        new = self.graph.create_node(node.op, node.target, args, kwargs, f"value_{len(self.new)}")
        new.meta["dtype"] = getattr(node.meta.get("val"), "dtype", None)  # a shape would name the program's symbols
        self.new[node] = new

    def _size(self, node: Node) -> Any:
        """A size of a tensor, computed of the symbols."""
        proxies = {symbol: Proxy(placeholder) for symbol, placeholder in self.sizes.items()}
        found = sympy_interp(PythonReferenceAnalysis, proxies, expression(node.meta["val"]))
        return found.node if isinstance(found, Proxy) else found

    def _text(self) -> str:
        """The graph with everything that can tell its inputs apart."""
        local = {symbol: sympy.Symbol(f"z{i}") for i, symbol in enumerate(self.sizes)}
        kinds = []
        for value in (node.meta["val"] for node in self.reads):
            shape = [expression(size).xreplace(local) for size in value.shape]
            kinds.append(f"{value.dtype} {shape} {value.device}")
        inner = [part for body in self.held.values() for part in body.modules() if isinstance(part, GraphModule)]
        held = [
            id(tensor) for part in inner for tensor in (*part.parameters(recurse=False), *part.buffers(recurse=False))
        ]
        bodies = [*(str(part.graph) for part in inner), str(held)]  # loops, and loops inside them
        return "\n".join([*kinds, *bodies, str(self.graph)])


def _held(program: KVProgram, node: Node) -> object:
    return program.held(node) if node.op == "get_attr" else None


def _writes(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def _measures(node: Node) -> bool:
    """Whether a node is the size of a tensor."""
    return isinstance(node.meta.get("val"), SymInt) and "sym_size" in str(node.target)


def _is_cheap_constant(program: KVProgram, node: Node, constants: set[Node]) -> bool:
    """Whether a node depends on sizes and weights alone and is quickly computed again, in the loop that reads it."""
    if node.op != "call_function":
        return False
    if isinstance(node.meta.get("val"), SYMBOLIC):
        return True
    tags = getattr(node.target, "tags", ())
    schema = getattr(node.target, "_schema", None)
    quick = node.target in FACTORIES or torch.Tag.pointwise in tags or _is_view(schema)
    return quick and all(
        source in constants or isinstance(_held(program, source), Tensor) for source in node.all_input_nodes
    )


def _is_view(schema: Any) -> bool:
    return schema is not None and any(a.alias_info is not None and not a.alias_info.is_write for a in schema.arguments)
