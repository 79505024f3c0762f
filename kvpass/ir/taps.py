"""Find the tensors that a press may read, by dataflow and never by the names of modules."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from kvpass.errors import MissingTapError
from kvpass.ir.attention_site import AttentionSite
from kvpass.ir.program import KVProgram, Role
from kvpass.ir.subgraph import Subgraph, nodes_between, reached_from

aten = torch.ops.aten
PRODUCTS = (aten.linear.default, aten.addmm.default, aten.mm.default, aten.matmul.default, aten.bmm.default)


TAP_NAMES = ("keys", "values", "queries", "queries_pre_rope", "keys_pre_rope", "hidden_states")


@dataclass(frozen=True)
class Rotation:
    """RoPE as it stands in the graph: from positions to frequencies, from states and frequencies to rotated states."""

    pre: Node  # [B, heads, S, D]
    table: Subgraph  # position_ids -> frequencies
    apply: Subgraph  # pre, *frequencies -> post

    def fingerprint(self) -> str:
        return f"{self.table.fingerprint()} | {self.apply.fingerprint()}"

    @property
    def constants(self) -> list[Node]:
        """The attributes that the table and the rotation read, such as inverse frequencies."""
        leaves = dict.fromkeys([*self.table.leaves(), *self.apply.leaves()])
        return [node for node in leaves if node.op == "get_attr"]


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
        raise MissingTapError(f"layer {site.layer}: there is no tap {name!r}")

    def rotation(self, site: AttentionSite, post: Node) -> Rotation:
        """The rotation that ends in `post`; empty if the layer has none."""
        stops = [n for n in nodes_between([post], []) if self._is_projection(n)]
        body = nodes_between([post], stops)
        mixing = [n for n in body if any(source in self._positional for source in n.all_input_nodes)]
        mixing = [n for n in mixing if n in self._from_tokens]
        positions = self.program.input_node(Role.POSITION_IDS)
        if not mixing:
            return Rotation(post, Subgraph((positions,), ()), Subgraph((post,), (post,)))
        frequencies = tuple(dict.fromkeys(s for n in mixing for s in n.all_input_nodes if s in self._positional))
        before = [n for n in [*stops, *body] if n < min(mixing) and n in self._from_tokens]
        for candidate in sorted(before, reverse=True):
            if self._shape(candidate) != self._shape(post):
                continue
            apply = Subgraph((candidate, *frequencies), (post,))
            if not all(n in reached_from([candidate], body) for n in apply.body if n in self._from_tokens):
                continue
            rotation = Rotation(candidate, Subgraph((positions,), frequencies), apply)
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
            shape = (1, int(value.shape[1]), 3, int(value.shape[3]))
            one, two = (torch.randn(shape, generator=generator).to(value.device, value.dtype) for _ in range(2))
            results: list[Tensor] = []
            for states in (one, two, one + two):
                tensors = dict(zip(rotation.apply.inputs, (states, *given), strict=True))
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

    def _is_projection(self, node: Node) -> bool:
        return node.target in PRODUCTS and any(_is_weight(source) for source in node.all_input_nodes)

    def _shape(self, node: Node) -> list[str]:
        value = node.meta["val"]
        return [self.program.shapes.text(n) for n in value.shape] if isinstance(value, Tensor) else []


def _is_weight(node: Node) -> bool:
    return node.op == "get_attr" or (node.target in (aten.t.default, aten.transpose.int) and _is_weight(node.args[0]))  # type: ignore[arg-type]
