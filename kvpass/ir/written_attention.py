"""Find attention that a model writes out, by dataflow; what it computes is measured elsewhere.

The form: a softmax whose input comes from the product of two activations, and whose output goes into a product with a
third one. What lies in between (scales, masks, caps, casts, reshapes, repeated heads) does not matter here.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from kvpass.ir.attention_site import is_attention
from kvpass.ir.program import KVProgram, Role
from kvpass.ir.subgraph import reached_from

aten = torch.ops.aten
SOFTMAX = (aten.softmax.int, aten._softmax.default)
PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.einsum.default)
LAYERS = (aten.linear.default, aten.mm.default, aten.addmm.default)  # products with weights, however these are given


@dataclass(frozen=True)
class WrittenAttention:
    """The nodes of one attention: states in front of it, the input of its softmax, and its result."""

    queries: Node  # these three and the result have one of the LAYOUTS
    keys: Node
    values: Node
    scores: Node  # input of the softmax; of an attention node its float mask
    softmax: Node  # or the attention node
    out: Node


@dataclass(frozen=True)
class Layout:
    """How [B, heads, S, D] lies in a tensor, by the place of its heads: 1, 2, 3 (merged with D), 0 (there is one)."""

    heads_at: int

    def place(self, states: Tensor) -> Tensor:
        """[B, heads, S, D] in this layout."""
        match self.heads_at:
            case 0:
                return states.squeeze(1)
            case 2:
                return states.transpose(1, 2)
            case 3:
                return states.transpose(1, 2).flatten(2)
        return states

    def restore(self, states: Tensor) -> Tensor:
        """[B, heads, S, D] of a tensor in this layout, which tells its heads apart."""
        match self.heads_at:
            case 0:
                return states.unsqueeze(1)
            case 2:
                return states.transpose(1, 2)
        return states


def layout_of(program: KVProgram, node: Node, merged: bool = False) -> Layout | None:
    """The layout of states over tokens; `merged`: three axes are [B, S, heads * D], not one head."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return None
    sizes = [program.shapes.text(size) for size in value.shape]
    match sizes:
        case ["B", heads, "S", width] if heads.isdigit() and width.isdigit():
            return Layout(1)
        case ["B", "S", heads, width] if heads.isdigit() and width.isdigit():
            return Layout(2)
        case ["B", "S", width] if width.isdigit():
            return Layout(3 if merged else 0)
    return None


def written_attentions(program: KVProgram) -> list[WrittenAttention]:
    """All places that have the form, in graph order."""
    nodes = list(program.graph.nodes)
    activations = reached_from([program.input_node(Role.INPUT_IDS)], nodes)
    found = (_around(program, node, activations) for node in nodes if node.target in SOFTMAX and node in activations)
    biased = (_biased(program, node) for node in nodes if is_attention(node))
    return [attention for attention in (*found, *biased) if attention is not None]


def _biased(program: KVProgram, node: Node) -> WrittenAttention | None:
    """An attention node with a float mask, which may hide more than a mask."""
    queries, keys, values, mask = (
        node.args[:4] if len(node.args) > 3 else (*node.args[:3], node.kwargs.get("attn_mask"))
    )
    if not (isinstance(queries, Node) and isinstance(keys, Node) and isinstance(values, Node)):
        return None
    if not isinstance(mask, Node) or not mask.meta["val"].dtype.is_floating_point:
        return None
    if any(layout_of(program, n) != Layout(1) for n in (queries, keys, values)):
        return None
    return WrittenAttention(queries, keys, values, mask, node, node)


def _around(program: KVProgram, softmax: Node, activations: set[Node]) -> WrittenAttention | None:
    scores = softmax.args[0]
    assert isinstance(scores, Node)
    before = _products(scores, activations, lambda node: node.all_input_nodes)
    behind = _products(softmax, activations, lambda node: node.users)
    if len(before) != 1 or len(behind) != 1:
        return None
    (score,), (mix,) = before, behind
    weights = reached_from([softmax], program.graph.nodes)
    others = [node for node in _operands(mix) if node not in weights]
    queries, keys = (_states(program, node, activations) for node in _operands(score))
    values = _states(program, others[0], activations) if len(others) == 1 else None
    out = _result(program, mix)
    if queries is None or keys is None or values is None or out is None:
        return None
    return WrittenAttention(queries, keys, values, scores, softmax, out)


def _products(start: Node, activations: set[Node], following: Callable[[Node], Iterable[Node]]) -> set[Node]:
    """The first products of two activations on all ways from `start`."""
    found: set[Node] = set()
    seen, work = {start}, [start]
    while work:
        node = work.pop()
        operands = _operands(node)
        if node.target in PRODUCTS and len(operands) == 2 and activations.issuperset(operands):
            found.add(node)
        elif node is start or not _is_boundary(node):
            ahead = [n for n in following(node) if n in activations and n not in seen]
            seen.update(ahead)
            work.extend(ahead)
    return found


def _operands(node: Node) -> list[Node]:
    """Both operands of a product, one twice if it is."""
    given = node.args[1] if node.target is aten.einsum.default else node.args[:2]
    return [n for n in given if isinstance(n, Node)] if isinstance(given, tuple | list) else []


def _is_boundary(node: Node) -> bool:
    """Where a way through attention ends: a layer with weights, a lookup, another attention."""
    weights = [n for n in node.all_input_nodes if n.op == "get_attr" and n.meta["val"].dim() > 1]
    ends = node.target in (*SOFTMAX, *PRODUCTS, *LAYERS) or is_attention(node)
    return node.op != "call_function" or ends or bool(weights)


def _states(program: KVProgram, node: Node, activations: set[Node]) -> Node | None:
    """The nearest node, at or in front of `node`, that holds states by head and token."""
    while layout_of(program, node) is None:
        sources = [n for n in node.all_input_nodes if n in activations]
        if len(sources) != 1 or _is_boundary(node):
            return None
        (node,) = sources
    return node


def _result(program: KVProgram, node: Node) -> Node | None:
    """The nearest node, at or behind `node`, that holds the attended states by token."""
    while layout_of(program, node, merged=True) is None:
        if len(node.users) != 1:
            return None
        (node,) = node.users
    return node


def unmatched(program: KVProgram) -> str:
    """What has the form of attention, and why it is none, for the end of an error."""
    reasons = {str(node.meta["unmatched"]): node.name for node in program.graph.nodes if "unmatched" in node.meta}
    return "".join(f" ({name}: {reason})" for reason, name in reasons.items())
