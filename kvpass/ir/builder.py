"""The only way to create nodes: trace a plain tensor function on fake values and inline what it did."""

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import SymBool, SymFloat, Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from kvpass.errors import PressError
from kvpass.ir.attention_site import AttentionSite
from kvpass.ir.kind import Kind, with_sizes
from kvpass.ir.program import KVProgram, Origin, Port
from kvpass.ir.symbols import SymbolicShapes, symbols_in

TensorFunction = Callable[..., Tensor | tuple[Tensor, ...]]
NamedTensorFunction = Callable[..., dict[str, Tensor]]


@dataclass
class GraphBuilder:
    """Adds nodes to one program on behalf of one pass; every node gets `val`, module stack, origin and name."""

    program: KVProgram
    made_by: str
    _shared: dict[str, Node] = field(default_factory=dict, init=False)
    _heads: set[Node] = field(default_factory=set, init=False)
    _traces: dict[Hashable, tuple[GraphModule, list[Any]]] = field(default_factory=dict, init=False)

    def placeholder(self, port: Port, value: Tensor) -> Node:
        """A new typed input, behind the ones that are there."""
        graph = self.program.graph
        last = list(self.program.placeholders())[-1]
        with graph.inserting_after(last):
            node = graph.placeholder(port.name)
        node.meta.update(val=value, kvpass=Origin(self.made_by, port.role.value, port.layer))
        self.program.inputs = (*self.program.inputs, port)
        return node

    def attribute(self, name: str, tensor: Tensor, like: AttentionSite) -> Node:
        """A constant of the graph, in the dtype and on the device of the site's keys."""
        keys = like.keys.meta["val"]
        return self.constant(name, tensor.detach().to(keys.device, keys.dtype), like.layer)

    def constant(self, name: str, tensor: Tensor, layer: int | None = None) -> Node:
        """A constant of the graph, as it is."""
        value = tensor.detach().contiguous()
        self.program.graph_module.register_buffer(name, value)
        with self.program.graph.inserting_before(_after(list(self.program.placeholders())[-1])):
            node = self.program.graph.get_attr(name)
        node.meta.update(val=self.program.shapes.fake(value), kvpass=Origin(self.made_by, "asset", layer))
        return node

    def inline(
        self,
        function: TensorFunction,
        inputs: Sequence[Node],
        *,
        names: Sequence[str],
        layer: int | None = None,
        like: Node | None = None,
        key: Hashable = None,
        reuse: Callable[[], bool] = lambda: True,
    ) -> tuple[Node, ...]:
        """Trace `function` on the values of `inputs` and put its nodes right behind the last of them.

        `names` are the roles of the outputs: `scores` in layer 3 becomes the node `scores_3`. `like` is the node
        whose module stack the new ones inherit. Calls with an equal `key` (of a function without variables of others:
        the function) and inputs of shapes that are equal but for names of sizes reuse one trace, if `reuse()` allows it
        after tracing, so that thirty equal layers are traced once. A node that depends on nothing of a layer is created
        once for all of them.
        """
        if key is None and getattr(function, "__closure__", function) is None:
            key = function
        results = self._inline(_numbered(function), inputs, names, layer, like, key, reuse)
        return tuple(results.values())

    def inline_named(
        self,
        function: NamedTensorFunction,
        inputs: Sequence[Node],
        *,
        layer: int | None = None,
        like: Node | None = None,
        key: Hashable = None,
        reuse: Callable[[], bool] = lambda: True,
    ) -> dict[str, Node]:
        """As `inline`, for a function that names its outputs itself. What it returns untouched keeps its own name."""
        return self._inline(function, inputs, None, layer, like, key, reuse)

    def _inline(
        self,
        function: NamedTensorFunction,
        inputs: Sequence[Node],
        names: Sequence[str] | None,
        layer: int | None,
        like: Node | None,
        key: Hashable,
        reuse: Callable[[], bool],
    ) -> dict[str, Node]:
        graph, trace = self._trace(function, inputs, key, reuse)
        placed: dict[Node, Node] = {}
        sources = [node for node in graph.nodes if node.op == "placeholder"]
        placed.update(zip(sources, inputs, strict=True))
        returned: dict[str, Node] = graph.output_node().args[0]  # type: ignore[assignment]
        results = dict(zip(names, returned.values(), strict=True)) if names is not None else dict(returned)
        roles = {node: name for name, node in results.items()}
        stack = (like or max(inputs)).meta.get("nn_module_stack", {})
        position = _after(max(inputs))
        while position in self._heads:  # they may be read
            position = position.next
        for node in graph.nodes:
            if node.op == "get_attr":
                placed[node] = self._subgraph(trace, node, position)
            if node.op != "call_function":
                continue
            role = roles.get(node, "")
            if not role and (twin := self._shared_twin(node, placed)) is not None:
                placed[node] = twin
                continue
            with self.program.graph.inserting_before(position):
                args, kwargs = map_arg((node.args, node.kwargs), placed.__getitem__)
                new = self.program.graph.create_node("call_function", node.target, args, kwargs, node.name)
            new.meta = {
                "val": node.meta["val"],
                "nn_module_stack": stack,
                "kvpass": Origin(self.made_by, role, layer),
            }
            if role:
                new._rename(role if layer is None else f"{role}_{layer}")
            placed[node] = new
        return {name: placed[node] for name, node in results.items()}

    def _subgraph(self, trace: GraphModule, node: Node, position: Node) -> Node:
        """The body of a loop, which a trace holds as a module of its own."""
        module = trace.get_submodule(str(node.target))
        number = sum(1 for name, _ in self.program.graph_module.named_children() if name.startswith(str(node.target)))
        name = f"{node.target}_{number}"
        self.program.graph_module.add_module(name, module)
        with self.program.graph.inserting_before(position):
            new = self.program.graph.get_attr(name)
        new.meta.update(val=module, kvpass=Origin(self.made_by))
        return new

    def _shared_twin(self, node: Node, placed: dict[Node, Node]) -> Node | None:
        """The one node at the head of the graph that stands for `node` in every layer; None if it belongs to one.

        Shared are sizes that an input has, and what is computed from attributes and shared nodes alone.
        """
        target, args, kwargs = node.target, *map_arg((node.args, node.kwargs), placed.__getitem__)
        source = self._size_of_input(node) if node.target is torch.ops.aten.sym_size.int else None
        if source is not None:
            args = source
        elif not all(n.op == "get_attr" or n in self._heads for n in map(placed.get, node.all_input_nodes) if n):
            return None
        text = f"{target}{args}{kwargs}"
        if text not in self._shared:
            position = _after(list(self.program.placeholders())[-1])
            while position in self._heads:
                position = position.next
            with self.program.graph.inserting_before(position):
                twin = self.program.graph.create_node("call_function", target, args, kwargs, node.name)
            twin.meta = {"val": node.meta["val"], "nn_module_stack": {}, "kvpass": Origin(self.made_by)}
            self._shared[text] = twin
            self._heads.add(twin)
        return self._shared[text]

    def _size_of_input(self, node: Node) -> tuple[Node, int] | None:
        """The input, and its dimension, that has the size which `node` reads."""
        text = self.program.shapes.text
        for source in self.program.placeholders():
            for axis, size in enumerate(source.meta["val"].shape):
                if not isinstance(size, int) and text(size) == text(node.meta["val"]):
                    return source, axis
        return None

    def _trace(
        self, function: NamedTensorFunction, inputs: Sequence[Node], key: Hashable, reuse: Callable[[], bool]
    ) -> tuple[Graph, GraphModule]:
        """The graph of what a function does with its inputs, and the module that holds the bodies of its loops."""
        shapes = self.program.shapes
        values = [node.meta["val"] for node in inputs]
        symbols = list(dict.fromkeys(symbol for value in values for symbol in symbols_in(value)))
        places = {symbol: sympy.Symbol(f"z{i}", integer=True, positive=True) for i, symbol in enumerate(symbols)}
        layout = (key, *map(shapes.range_of, symbols), *(Kind.of(value).replaced(places) for value in values))
        trace, those = self._traces.get(layout, (None, [])) if key is not None else (None, [])
        if trace is not None and those == symbols:
            return trace.graph, trace
        if trace is not None and _can_be_renamed(trace.graph):
            return _with_sizes(trace.graph, dict(zip(those, symbols, strict=True)), shapes), trace
        before = shapes.specialized()
        with shapes.fake_mode, torch.no_grad():
            try:
                trace = make_fx(function, pre_dispatch=True)(*values)
            except PressError as error:
                raise type(error)(shapes.renamed(str(error))) from error
        for node in trace.graph.nodes:
            if node.op == "get_attr" and not isinstance(getattr(trace, str(node.target)), GraphModule):
                raise PressError(
                    f"{self.made_by}: {_label(function)} uses a tensor made outside of it ({node.target}); "
                    "pass it as an input, or make it inside"
                )
        frozen = {name: value for name, value in shapes.specialized().items() if name not in before}
        if frozen:
            raise PressError(
                f"{self.made_by}: {_label(function)} freezes the size {frozen} into the graph; use tensor operations "
                "or torch.sym_int on sizes, not int(), and no operation that needs a size as a number"
            )
        trace.graph.eliminate_dead_code()
        if key is not None and reuse():
            self._traces[layout] = trace, symbols
        return trace.graph, trace


def _can_be_renamed(graph: Graph) -> bool:
    """Whether `_with_sizes` reaches all sizes: not those in the body of a loop, nor what was found out about sizes."""
    values = [node.meta.get("val") for node in graph.nodes]
    return not graph.find_nodes(op="get_attr") and not any(isinstance(v, SymBool | SymFloat) for v in values)


def _with_sizes(graph: Graph, symbols: Mapping[Any, Any], shapes: SymbolicShapes) -> Graph:
    """A copy whose values have other symbols in their sizes."""
    copy = Graph()
    copy.output(copy.graph_copy(graph, {}))
    for node in copy.nodes:
        if node.op == "call_function":
            node.meta = {"val": with_sizes(node.meta["val"], symbols, shapes)}
    return copy


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)`, without a node where there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _numbered(function: TensorFunction) -> NamedTensorFunction:
    @functools.wraps(function)
    def named(*tensors: Tensor) -> dict[str, Tensor]:
        outputs = function(*tensors)
        return {str(i): t for i, t in enumerate(outputs if isinstance(outputs, tuple) else (outputs,))}

    return named


def _after(node: Node) -> Node:
    """Where to insert so that `node` and all placeholders are defined."""
    following = node.next
    while following.op in ("placeholder", "get_attr"):
        following = following.next
    return following


def _label(function: Callable[..., object]) -> str:
    return getattr(function, "__qualname__", repr(function))
