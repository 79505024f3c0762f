"""Find the tensors that a press may read, by dataflow and never by the names of modules."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from kvpass.errors import MissingTapError
from kvpass.ir.attention_site import AttentionSite, is_attention
from kvpass.ir.program import KVProgram, Role
from kvpass.ir.rotary import GraphRope, Rotation
from kvpass.ir.subgraph import Subgraph, nodes_between, reached_from

aten = torch.ops.aten
PRODUCTS = (aten.linear.default, aten.addmm.default, aten.mm.default, aten.matmul.default, aten.bmm.default)


TAP_NAMES = (
    "keys",
    "values",
    "queries",
    "queries_pre_rope",
    "keys_pre_rope",
    "hidden_states",
    "output_weight",
)
TURNS = (aten.t.default, aten.transpose.int, aten.permute.default)
MOVES = ("transpose", "permute", "reshape", "view", "clone", "contiguous", "flatten", "_unsafe_view", "to", "_to_copy")


@dataclass(frozen=True)
class LayerTaps:
    """All taps of one layer: the nodes of those that it has, and why it lacks the others."""

    nodes: dict[str, Node]
    missing: dict[str, MissingTapError]
    rotations: dict[str, Rotation | MissingTapError]

    def values(self, computed: Mapping[str, Tensor]) -> dict[str, Tensor | MissingTapError]:
        """What presses get of what the nodes have computed: states as [B, heads, S, D]."""
        before = {"queries_pre_rope": self.rotations["rope"], "keys_pre_rope": self.rotations["key_rope"]}
        turned = {
            name: rotation.turned(computed[name])
            for name, rotation in before.items()
            if name in computed and isinstance(rotation, Rotation)
        }
        return {**computed, **turned, **self.missing}

    @property
    def constants(self) -> dict[str, Node]:
        """The attributes that the rotations read."""
        rotations = [r for r in self.rotations.values() if isinstance(r, Rotation)]
        return {str(node.target): node for rotation in rotations for node in rotation.constants}

    def fingerprint(self) -> str:
        """Equal for layers that rotate alike."""
        parts = [str(r) if isinstance(r, MissingTapError) else r.fingerprint() for r in self.rotations.values()]
        return " || ".join([*parts, *self.constants])

    def ropes(self, program: KVProgram, constants: Mapping[str, Tensor]) -> dict[str, GraphRope | MissingTapError]:
        """The rotations as functions, over the values of `constants`."""
        given = {node: constants[name] for name, node in self.constants.items()}
        return {
            name: found if isinstance(found, MissingTapError) else GraphRope(program, found, given)
            for name, found in self.rotations.items()
        }


class Taps:
    """The taps of all sites of one program; derived anew after every change of the graph."""

    def __init__(self, program: KVProgram) -> None:
        self.program = program
        nodes = list(program.graph.nodes)
        self._from_tokens = reached_from([program.input_node(Role.INPUT_IDS)], nodes)
        positions = program.input_node(Role.POSITION_IDS)
        self._linear: dict[str, bool] = {}
        self._positional = reached_from([positions], nodes) - self._from_tokens

    def node(self, site: AttentionSite, name: str) -> Node:
        """The node of one tap; `MissingTapError` says which layer lacks it and why."""
        match name:
            case "queries" | "keys" | "values":
                found: Node = getattr(site, name)
                return found
            case "queries_pre_rope":
                return self.rotation(site, site.queries).pre
            case "keys_pre_rope":
                return self.rotation(site, site.keys).pre
            case "hidden_states":
                return self._projection(site, site.queries)
            case "output_weight":
                return self._output_weight(site)
        raise MissingTapError(f"layer {site.layer}: there is no tap {name!r}")

    def of_layer(self, site: AttentionSite) -> LayerTaps:
        """All that a press may read of one layer."""
        found = LayerTaps({}, {}, {})
        for name in TAP_NAMES:
            try:
                found.nodes[name] = self.node(site, name)
            except MissingTapError as error:
                found.missing[name] = error
        for name, post in (("rope", site.queries), ("key_rope", site.keys)):
            try:
                found.rotations[name] = self.rotation(site, post)
            except MissingTapError as error:
                found.rotations[name] = error
        return found

    def rotation(self, site: AttentionSite, post: Node) -> Rotation:
        """The rotation that ends in `post`; empty if the layer has none."""
        stops = [n for n in nodes_between([post], []) if self._is_projection(n) or is_attention(n)]
        body = nodes_between([post], stops)
        mixing = [n for n in body if any(source in self._positional for source in n.all_input_nodes)]
        mixing = [n for n in mixing if n in self._from_tokens]
        positions = self.program.input_node(Role.POSITION_IDS)
        if not mixing:
            return Rotation(post, Subgraph((positions,), ()), Subgraph((post,), (post,)))
        frequencies = tuple(dict.fromkeys(s for n in mixing for s in n.all_input_nodes if s in self._positional))
        before = [n for n in [*stops, *body] if n < min(mixing) and n in self._from_tokens]
        for candidate in sorted(before, reverse=True):
            batch, heads, tokens, width = self._shape(post)
            token_major = self._shape(candidate) == [batch, tokens, heads, width]
            if not token_major and self._shape(candidate) != [batch, heads, tokens, width]:
                continue
            apply = Subgraph((candidate, *frequencies), (post,))
            if not all(n in reached_from([candidate], body) for n in apply.body if n in self._from_tokens):
                continue
            rotation = Rotation(candidate, Subgraph((positions,), frequencies), apply, token_major)
            if self._is_linear(rotation):
                return rotation
        raise MissingTapError(
            f"layer {site.layer}: no state before RoPE found on the way to {post.name}; it is no rotation, linear "
            "in one tensor [B, heads, S, D], by the positions"
        )

    def _is_linear(self, rotation: Rotation) -> bool:
        """Whether rotating commutes with adding, tried on random states; once for each distinct computation."""
        form = rotation.fingerprint()
        if form not in self._linear:
            value: Tensor = rotation.pre.meta["val"]
            sizes = self.program.shapes.bind(B=1, S=3)
            constants = {node: self.program.attribute(node) for node in rotation.constants}
            positions = torch.arange(3, device=value.device)[None] + 5
            given = rotation.table.run({rotation.table.inputs[0]: positions, **constants}, sizes)
            generator = torch.Generator().manual_seed(0)
            shape = (1, rotation.heads, 3, int(value.shape[3]))
            one, two = (torch.randn(shape, generator=generator).to(value.device, value.dtype) for _ in range(2))
            results: list[Tensor] = []
            for states in (one, two, one + two):
                tensors = dict(zip(rotation.apply.inputs, (rotation.turned(states), *given), strict=True))
                results += rotation.apply.run({**tensors, **constants}, sizes)
            error = (results[0] + results[1] - results[2]).abs().max()
            self._linear[form] = bool(error <= 16 * torch.finfo(value.dtype).eps * results[2].abs().max())
        return self._linear[form]

    def _projection(self, site: AttentionSite, post: Node) -> Node:
        """What the projection nearest to `post` reads."""
        found = [n for n in nodes_between([post], []) if self._is_projection(n) and n in self._from_tokens]
        if not found:
            raise MissingTapError(f"layer {site.layer}: {post.name} comes from no projection, so no hidden states")
        return next(n for n in max(found).all_input_nodes if n in self._from_tokens)

    def _output_weight(self, site: AttentionSite) -> Node:
        """The weight of the linear layer that reads all heads of the attention, side by side."""
        node, width = site.node, site.shape(site.values)[3] * int(site.queries.meta["val"].shape[1])
        while len(node.users) == 1:
            (node,) = node.users
            if node.target is aten.linear.default:
                weight = node.args[1]
                assert isinstance(weight, Node)
                if weight.op == "get_attr" and weight.meta["val"].shape[1] == width:
                    return weight
            if getattr(getattr(node.target, "_schema", None), "name", "").removeprefix("aten::") not in MOVES:
                break
        raise MissingTapError(
            f"layer {site.layer}: no output weight, its attention does not go straight into a linear layer "
            f"({node.name} is in between)"
        )

    def _is_projection(self, node: Node) -> bool:
        return node.target in PRODUCTS and any(_is_weight(source) for source in node.all_input_nodes)

    def _shape(self, node: Node) -> list[str]:
        value = node.meta["val"]
        return [self.program.shapes.text(n) for n in value.shape] if isinstance(value, Tensor) else []


def _is_weight(node: Node) -> bool:
    return node.op == "get_attr" or (node.target in TURNS and _is_weight(node.args[0]))  # type: ignore[arg-type]
