"""Recognise attention that is written out."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from kvpass.ir.attention_op import ATTENTION
from kvpass.ir.builder import GraphBuilder
from kvpass.ir.form import Form
from kvpass.ir.measured_attention import Measured, NotAttentionError, Probe
from kvpass.ir.program import KVProgram, Role
from kvpass.ir.written_attention import Layout, written_attentions
from kvpass.pass_manager import Pass


@dataclass(frozen=True)
class MatchAttention(Pass):
    """Replace a softmax between two products of activations by one attention node, if that computes the same.

    before:  matmul: f32[B, 4, S, S] = matmul(q, transpose(k, 2, 3))
             mul: f32[B, 4, S, S] = mul(matmul, 0.25)
             add: f32[B, 4, S, S] = add(mul, mask)
             softmax: f32[B, 4, S, S] = softmax(add, -1)
             matmul_1: f32[B, 4, S, 16] = matmul(softmax, v)
    after:   attention: f32[B, 4, S, 16] = scaled_dot_product_attention(q, k, v, allowed, 0.0, False, scale=0.25)

    Scale, soft-cap, sinks and slopes are read out by running what lies between the products on chosen numbers, and
    proved on random ones. What is no attention stays, with the reason in `meta["unmatched"]` of its softmax.
    """

    name: ClassVar[str] = "match-attention"
    requires: ClassVar[Form] = Form.CAPTURED
    produces: ClassVar[Form] = Form.CAPTURED

    def run(self, program: KVProgram) -> int:
        builder = GraphBuilder(program, self.name)
        known: dict[str, tuple[Measured, Node]] = {}
        matches = 0
        for written in written_attentions(program):
            try:
                probe = Probe(program, written)
                form = probe.whole.fingerprint()
                if form not in known:
                    known[form] = probe.measure(), _mask(program, builder, probe)
                if probe.biased and known[form][0].slopes is None:
                    continue  # a mask and nothing else
            except NotAttentionError as error:
                written.softmax.meta["unmatched"] = str(error)
                continue
            _replace(program, builder, probe, *known[form])
            matches += 1
        program.drop_dead()
        return matches


def _mask(program: KVProgram, builder: GraphBuilder, probe: Probe) -> Node:
    """The model's own mask as bool[B, H, S, S]: what it computes at states that are zero."""
    ids, positions = program.input_node(Role.INPUT_IDS), program.input_node(Role.POSITION_IDS)
    constants = [n for n in probe.logits.leaves() if n.op == "get_attr"]
    dtype = probe.attention.queries.meta["val"].dtype

    def allowed(ids: Tensor, positions: Tensor, *tensors: Tensor) -> Tensor:
        batch, length = ids.shape
        q, k = (
            torch.zeros(batch, heads, length, probe.width, dtype=dtype, device=ids.device)
            for heads in (probe.heads, probe.kv_heads)
        )
        given = {program.input_node(Role.POSITION_IDS): positions, **dict(zip(constants, tensors, strict=True))}
        return probe.allowed(q, k, given, program.shapes.bind(B=batch, S=length))

    (node,) = builder.inline(allowed, [ids, positions, *constants], names=["allowed"])
    return node


def _replace(program: KVProgram, builder: GraphBuilder, probe: Probe, measured: Measured, mask: Node) -> None:
    written = probe.attention
    states = [
        _restored(builder, node, layout)
        for node, layout in zip((written.queries, written.keys, written.values), probe.layouts, strict=True)
    ]
    sinks, slopes = (
        [] if numbers is None else [_numbers(program, builder, probe, name, numbers)]
        for name, numbers in (("sinks", measured.sinks), ("slopes", measured.slopes))
    )

    scale, softcap, grouped = measured.scale, measured.softcap, probe.heads != probe.kv_heads

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *extra: Tensor) -> Tensor:
        if measured.plain:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)
        rest = iter(extra)
        columns = [next(rest) if found else None for found in (sinks, slopes)]
        out: Tensor = ATTENTION(q, k, v, mask, 0.0, False, *columns, scale=scale, enable_gqa=grouped, softcap=softcap)
        return out

    inputs = [*states, mask, *sinks, *slopes]
    (node,) = builder.inline(attention, inputs, names=["attention"], like=written.softmax)
    if probe.result.heads_at != 1:
        (node,) = builder.inline(
            lambda states: probe.result.place(states), [node], names=["attended"], like=written.softmax
        )
    written.out.replace_all_uses_with(node)


def _restored(builder: GraphBuilder, node: Node, layout: Layout) -> Node:
    """States as [B, heads, S, D]."""
    if layout.heads_at == 1:
        return node
    (restored,) = builder.inline(lambda states: layout.restore(states), [node], names=["states"], like=node)
    return restored


def _numbers(program: KVProgram, builder: GraphBuilder, probe: Probe, name: str, numbers: Tensor) -> Node:
    """One number for each head: the parameter that holds them, else a new constant."""
    for leaf in probe.logits.leaves():
        if leaf.op == "get_attr" and torch.equal(program.attribute(leaf).to(numbers), numbers):
            return leaf
    taken: dict[str, Node] = {str(node.target): node for node in program.graph.nodes if node.op == "get_attr"}
    numbers = numbers.to(torch.float32)
    for target, node in taken.items():
        if target.startswith(f"{name}_") and torch.equal(program.attribute(node), numbers):
            return node
    return builder.constant(f"{name}_{sum(target.startswith(name) for target in taken)}", numbers)
