"""Let attentions that weigh alike be one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from kvpass.ir.attention_site import is_attention
from kvpass.ir.builder import GraphBuilder
from kvpass.ir.form import Form
from kvpass.ir.program import KVProgram
from kvpass.ir.rename import renumber
from kvpass.ir.subgraph import argument, nodes_between, reached_from
from kvpass.pass_manager import Pass


@dataclass(frozen=True)
class MergeAttention(Pass):
    """Join attentions of the same queries over the same keys, so that the keys are cached once.

    before:  attention: f32[B, 4, S, 16] = scaled_dot_product_attention(q, k, v, None, 0.0, True)
             attention_1: f32[B, 4, S, 16] = scaled_dot_product_attention(q, k, w, None, 0.0, True)
    after:   attention: f32[B, 4, S, 32] = scaled_dot_product_attention(q, k, cat([v, w], -1), None, 0.0, True)
             split: (...) = split(attention, [16, 16], -1)
    """

    name: ClassVar[str] = "merge-attention"
    requires: ClassVar[Form] = Form.NORMAL
    produces: ClassVar[Form] = Form.NORMAL

    def run(self, program: KVProgram) -> int:
        builder = GraphBuilder(program, self.name)
        alike: dict[str, list[Node]] = {}
        for node in program.graph.nodes:
            if is_attention(node):
                alike.setdefault(_weights(node), []).append(node)
        groups = [nodes for nodes in alike.values() if len(nodes) > 1 and _independent(program, nodes)]
        for nodes in groups:
            _merge(builder, nodes)
        if groups:
            program.drop_dead()
            renumber(program)
        return len(groups)


def _weights(node: Node) -> str:
    """All that decides where an attention looks: every argument but its values."""
    named = {parameter.name: argument(node, parameter.name) for parameter in node.target._schema.arguments}  # type: ignore[union-attr]
    value = named.pop("value")
    assert isinstance(value, Node)
    shape = [str(size) for size in value.meta["val"].shape[:-1]]
    return f"{node.target} {named} {shape}"


def _independent(program: KVProgram, nodes: Sequence[Node]) -> bool:
    """Whether none of them reads what another one gives."""
    behind = reached_from(nodes, program.graph.nodes) - set(nodes)
    return not any(source in behind for node in nodes for source in node.all_input_nodes)


def _merge(builder: GraphBuilder, nodes: Sequence[Node]) -> None:
    first = nodes[0]
    values: list[Node] = [argument(node, "value") for node in nodes]  # type: ignore[misc]
    inputs = list(dict.fromkeys([*first.all_input_nodes, *values]))
    widths = [int(value.meta["val"].shape[-1]) for value in values]

    def attention(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(inputs, tensors, strict=True))
        together = torch.cat([given[value] for value in values], dim=-1)
        args, kwargs = map_arg((first.args, first.kwargs), given.__getitem__)
        out: Tensor = first.target(*args[:2], together, *args[3:], **kwargs)  # type: ignore[operator]
        return tuple(out.split(widths, dim=-1))

    parts = builder.inline(attention, inputs, names=[f"part_{i}" for i in range(len(nodes))], like=first)
    (joined,) = (n for n in nodes_between(parts, inputs) if is_attention(n))
    joined.meta = {**first.meta, **joined.meta}  # what its mask was found to be
    for node, part in zip(nodes, parts, strict=True):
        node.replace_all_uses_with(part)
