"""Read weights at the speed of memory where a single token is multiplied by them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from kvpass.ir.builder import GraphBuilder, cast
from kvpass.ir.form import Form
from kvpass.ir.program import KVProgram, layer_of
from kvpass.pass_manager import Pass

aten = torch.ops.aten


@dataclass(frozen=True)
class StreamWeights(Pass):
    """Write projections of one token as products and sums, which inductor fuses into loops that read a weight once.

    before:  linear: f32[1, 1, 64] = linear(mul_4, q_proj.weight)
    after:   row: f32[1, 64] = as_strided(reshape(mul_4, [1, -1]), [1, 64], [64, 1])
             streamed: f32[64] = sum(mul(q_proj.weight, row), [1])

    A decode step of one row computes little more than what it reads weights for, and the matrix products of a CPU read
    them at half of what its memory gives. Sums are in float32, as there. as_strided has inductor write the row to
    memory; else the norm in front of it would be computed anew for every row of the weight.
    """

    name: ClassVar[str] = "stream-weights"
    requires: ClassVar[Form] = Form.LOWERED
    produces: ClassVar[Form] = Form.LOWERED

    def run(self, program: KVProgram) -> int:
        builder = GraphBuilder(program, self.name)
        found = [node for node in program.graph.nodes if self._streams(node)]
        laid_down: dict[Node, Node] = {}  # by what is multiplied, once for all projections of it
        for node in found:
            states, *weights = (argument for argument in node.args if isinstance(argument, Node))
            if states not in laid_down:
                laid_down[states] = self._inlined(builder, in_memory, [states], "row", states)
            form = streamed if len(weights) == 1 else streamed_with_bias
            product = self._inlined(builder, form, [laid_down[states], *weights], "streamed", node)
            node.replace_all_uses_with(self._inlined(builder, _as_states, [product, states], "projected", node))
            program.graph.erase_node(node)
        return len(found)

    def _inlined(
        self, builder: GraphBuilder, form: Callable[..., Tensor], tensors: list[Node], name: str, like: Node
    ) -> Node:
        (made,) = builder.inline(form, tensors, names=[name], layer=layer_of(like), like=like, key=form)
        return made

    def _streams(self, node: Node) -> bool:
        """Whether it is the product of a single token with a weight."""
        if node.target is not aten.linear.default:
            return False
        states, weight = node.args[:2]
        assert isinstance(states, Node) and isinstance(weight, Node)
        return weight.op == "get_attr" and all(size == 1 for size in states.meta["val"].shape[:-1])


def in_memory(states: Tensor) -> Tensor:
    """states [1, 1, K] as f32[1, K] in memory of its own"""
    row = cast(states.reshape(1, -1), torch.float32)
    return row.as_strided(row.shape, (row.shape[1], 1))


def streamed(row: Tensor, weight: Tensor) -> Tensor:
    """f32[1, K] times weight [N, K], as f32[N]"""
    return (cast(weight, torch.float32) * row).sum(dim=1)


def streamed_with_bias(row: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The same plus bias [N]."""
    return streamed(row, weight) + bias


def _as_states(product: Tensor, states: Tensor) -> Tensor:
    return cast(product.reshape(*states.shape[:-1], -1), states.dtype)
