"""Compute the logits of the last token only."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from kvpass.ir.builder import GraphBuilder
from kvpass.ir.form import Form
from kvpass.ir.program import KVProgram, Role
from kvpass.ir.propagate import refresh_values
from kvpass.pass_manager import Pass

aten = torch.ops.aten
PROJECTIONS = (aten.linear.default, aten.matmul.default)


@dataclass(frozen=True)
class KeepLastLogits(Pass):
    """Slice the hidden states before the projection to the vocabulary, the greatest matrix of most models.

    before:  linear_14: f32[B, S, 256] = linear(mul_22, lm_head.weight)
    after:   last: f32[B, 1, 64] = slice(mul_22, 1, -1, end)
             linear_14: f32[B, 1, 256] = linear(last, lm_head.weight)
    """

    name: ClassVar[str] = "keep-last-logits"
    requires: ClassVar[Form] = Form.SPECIALIZED
    produces: ClassVar[Form] = Form.SPECIALIZED

    def run(self, program: KVProgram) -> int:
        builder = GraphBuilder(program, self.name)
        logits = program.output_value(Role.LOGITS)
        head = self._projection(logits)
        source = head.args[0] if head is not None else logits
        assert isinstance(source, Node)
        if _text(program, source)[1] == "1":
            return 0
        (last,) = builder.inline(keep_last, [source], names=["last"])
        source.replace_all_uses_with(last, lambda user: user is head or (head is None and user.op == "output"))
        refresh_values(program, last)
        return 1

    def _projection(self, logits: Node) -> Node | None:
        """The projection that ends in `logits` through operations on single elements alone."""
        node = logits
        while node.target not in PROJECTIONS:
            tensors = [n for n in node.all_input_nodes if isinstance(n.meta["val"], Tensor) and n.op != "get_attr"]
            same = tensors and tensors[0].meta["val"].shape == node.meta["val"].shape
            if len(tensors) != 1 or not same or not _is_pointwise(node):
                return None
            node = tensors[0]
        return node


def keep_last(hidden: Tensor) -> Tensor:
    """[B, S, D_model] -> [B, 1, D_model]"""
    return hidden[:, -1:]


def _is_pointwise(node: Node) -> bool:
    return torch.Tag.pointwise in getattr(node.target, "tags", ())


def _text(program: KVProgram, node: Node) -> list[str]:
    return [program.shapes.text(size) for size in node.meta["val"].shape]
