"""A captured model on its way through the passes."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import Enum

from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from kvpass.ir.form import Form, Phase
from kvpass.ir.symbols import SymbolicShapes


class Role(Enum):
    """What a graph input or output is."""

    INPUT_IDS = "input_ids"  # i64[B, S]
    EMBEDDINGS = "inputs_embeds"  # [B, S, D_model], instead of the ids
    POSITION_IDS = "position_ids"  # i64[B, S], positions in the original text
    POSITION_AXES = "position_axes"  # i64[axes, B, S], beside the ids' positions: time, height, width of an image
    LENGTHS = "lengths"  # i64[L, B], occupied cache slots before this call; of a ring, tokens seen
    NEW_TOKENS = "new_tokens"  # i64[B], how many of the S tokens are meant; those behind them are padding
    SIZE = "size"  # f32[n]; only its length counts, e.g. the pairs that a pressed layer keeps
    SCALAR = "scalar"  # f32[]
    KEYS = "keys"  # [B, Hkv, C, D], one per layer
    VALUES = "values"  # [B, Hkv, C, D], one per layer
    POSITIONS = "positions"  # i64[B, Hkv, C], positions of the entries of a layer that attends by distance
    LOGITS = "logits"  # [B, S, V], or [B, 1, V] in prefill
    KEPT = "kept"  # i64[B, Hkv, N], positions kept in a pressed layer, ascending
    COUNT = "count"  # i64[B], how many of the N slots of a pressed layer are occupied, where rows differ


STORED = (Role.KEYS, Role.VALUES, Role.POSITIONS)  # what a cache stores of a layer, in this order


@dataclass(frozen=True)
class Port:
    """One typed input or output of a program.

    An output with `updates` is the new value of that input. `key` is what the press calls its sizes and scalars.
    """

    name: str
    role: Role
    layer: int | None = None
    updates: str | None = None
    key: str = ""


@dataclass(frozen=True)
class Origin:
    """Where a node that a pass created comes from; kept in `node.meta["kvpass"]`."""

    made_by: str
    role: str = ""
    layer: int | None = None


@dataclass
class KVProgram:
    """One graph, its typed ports, and the world of symbolic sizes that its fake values live in."""

    graph_module: GraphModule
    form: Form
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    shapes: SymbolicShapes
    phase: Phase | None = None
    layer_count: int = 0
    model_name: str = ""  # as its checkpoint is called
    max_tokens: int = 2**20  # the longest text
    rows_share_positions: bool = False  # whether the graph reads the positions of the first row alone
    notes: tuple[str, ...] = ()  # what was decided at capture and changes results
    history: tuple[str, ...] = field(default=())

    @property
    def graph(self) -> Graph:
        return self.graph_module.graph

    def copy(self) -> "KVProgram":
        """An independent graph over the same parameters."""
        graph = Graph()
        graph.output(graph.graph_copy(self.graph, {}))
        for old, new in zip(self.graph.nodes, graph.nodes, strict=True):
            new.meta = dict(old.meta)
        return replace(self, graph_module=GraphModule(self.graph_module, graph))

    def placeholders(self) -> Iterator[Node]:
        return (node for node in self.graph.nodes if node.op == "placeholder")

    @property
    def axes(self) -> int:
        """How many positions a token has: 1, or as many as the graph reads in `position_axes`."""
        names = [port.name for port in self.inputs if port.role is Role.POSITION_AXES]
        return next((int(node.meta["val"].shape[0]) for node in self.placeholders() if node.target in names), 1)

    def input_node(self, role: Role, layer: int | None = None) -> Node:
        """The placeholder that has this role."""
        names = [port.name for port in self.inputs if port.role is role and port.layer == layer]
        if not names:
            raise KeyError(f"the {self.form.name} graph has no input {role.value!r} for layer {layer}")
        return next(node for node in self.placeholders() if node.target == names[0])

    def token_node(self) -> Node:
        """The placeholder that the tokens come in by, [B, S] as ids or [B, S, D_model] as embeddings."""
        (name,) = [port.name for port in self.inputs if port.role in (Role.INPUT_IDS, Role.EMBEDDINGS)]
        return next(node for node in self.placeholders() if node.target == name)

    def output_node(self) -> Node:
        return self.graph.output_node()

    def output_value(self, role: Role, layer: int | None = None) -> Node:
        """The node whose value leaves the graph as this output."""
        index = next(i for i, port in enumerate(self.outputs) if port.role is role and port.layer == layer)
        value = self.output_node().args[0][index]  # type: ignore[index]
        assert isinstance(value, Node)
        return value

    def add_output(self, port: Port, value: Node) -> None:
        """Let one more value leave the graph."""
        node = self.output_node()
        node.args = ((*node.args[0], value),)  # type: ignore[misc]
        self.outputs = (*self.outputs, port)

    def drop_output(self, port: Port) -> None:
        """Let an output end inside the graph (its input is written in place instead)."""
        node = self.output_node()
        index = self.outputs.index(port)
        node.args = (tuple(v for i, v in enumerate(node.args[0]) if i != index),)  # type: ignore[arg-type]
        self.outputs = tuple(p for p in self.outputs if p is not port)

    def drop_dead(self) -> None:
        """Erase what no output needs, also what torch would keep for its random numbers: attention, dropout."""
        self.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))

    def attribute(self, node: Node) -> Tensor:
        """The real parameter or buffer that a `get_attr` node names."""
        found = self.held(node)
        assert isinstance(found, Tensor)
        return found

    def held(self, node: Node) -> Tensor | GraphModule:
        """What a `get_attr` node names: a parameter, a buffer, or the body of a loop."""
        owner: object = self.graph_module
        for atom in str(node.target).split("."):
            owner = getattr(owner, atom)
        assert isinstance(owner, Tensor | GraphModule)
        return owner


def layer_of(node: Node) -> int | None:
    """The layer that a node belongs to: as located, by the pass that made it, or by the module it was traced in."""
    site = node.meta.get("site")
    if site is not None:
        return int(site.layer)
    origin = node.meta.get("kvpass")
    if isinstance(origin, Origin) and origin.layer is not None:
        return origin.layer
    for path, _ in node.meta.get("nn_module_stack", {}).values():
        for atom in str(path).split("."):
            if atom.isdigit():
                return int(atom)
    return None
