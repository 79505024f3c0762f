"""Read weights at the speed of memory where a single token is multiplied by them."""

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
    after:   mul_5: f32[64, 64] = mul(q_proj.weight, mul_4)
             linear: f32[1, 1, 64] = sum(mul_5, [1])

    Nothing else is computed in a decode step of one row than what the weights are read for, and the matrix products of
    a CPU read them at half of what its memory gives. Sums are in float32, as there.
    """

    name: ClassVar[str] = "stream-weights"
    requires: ClassVar[Form] = Form.LOWERED
    produces: ClassVar[Form] = Form.LOWERED

    def run(self, program: KVProgram) -> int:
        builder = GraphBuilder(program, self.name)
        found = [node for node in program.graph.nodes if self._streams(node)]
        for node in found:
            tensors = [argument for argument in node.args if isinstance(argument, Node)]
            product = self._product(builder, node, tensors)
            node.replace_all_uses_with(product)
            program.graph.erase_node(node)
        return len(found)

    def _product(self, builder: GraphBuilder, node: Node, tensors: list[Node]) -> Node:
        form = streamed if len(tensors) == 2 else streamed_with_bias
        (product,) = builder.inline(form, tensors, names=["streamed"], layer=layer_of(node), like=node, key=form)
        return product

    def _streams(self, node: Node) -> bool:
        """Whether it is the product of a single token with a weight."""
        if node.target is not aten.linear.default:
            return False
        states, weight = node.args[:2]
        assert isinstance(states, Node) and isinstance(weight, Node)
        return weight.op == "get_attr" and all(size == 1 for size in states.meta["val"].shape[:-1])


def streamed(states: Tensor, weight: Tensor) -> Tensor:
    """states [1, 1, K] times weight [N, K], as [1, 1, N]"""
    return _as_states(_sums(states, weight), states)


def streamed_with_bias(states: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The same plus bias [N]."""
    return _as_states(_sums(states, weight) + bias, states)


def _sums(states: Tensor, weight: Tensor) -> Tensor:
    return (cast(weight, torch.float32) * cast(states.reshape(1, -1), torch.float32)).sum(dim=1)


def _as_states(product: Tensor, states: Tensor) -> Tensor:
    return cast(product.reshape(*states.shape[:-1], -1), states.dtype)
