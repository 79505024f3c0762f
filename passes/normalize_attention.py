"""Bring every attention into one form, whichever road it was captured on."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from kvpass.errors import UnsupportedModelError
from kvpass.ir.attention_site import is_attention, is_over_tokens
from kvpass.ir.builder import GraphBuilder
from kvpass.ir.form import Form
from kvpass.ir.mask_evaluation import evaluations
from kvpass.ir.masks import Causal, Sliding, classify, prompt_mask
from kvpass.ir.program import KVProgram, Role, layer_of
from kvpass.ir.rename import renumber
from kvpass.ir.subgraph import Subgraph, argument
from kvpass.pass_manager import Pass


@dataclass(frozen=True)
class NormalizeAttention(Pass):
    """Replace masks by what they are (causal, or one shared mask per window or chunk) and undo repeated KV heads.

    Masks and repeats are recognised by evaluating them, never by their nodes.

    before:  attn: f32[B, 4, S, 16] = scaled_dot_product_attention(q, repeated_k, repeated_v, mask)
    after:   attn: f32[B, 4, S, 16] = scaled_dot_product_attention(q, k, v, None, 0.0, True, enable_gqa=True)
    """

    name: ClassVar[str] = "normalize-attention"
    requires: ClassVar[Form] = Form.CAPTURED
    produces: ClassVar[Form] = Form.NORMAL

    def run(self, program: KVProgram) -> int:
        builder = GraphBuilder(program, self.name)
        masks: dict[Causal, Node] = {}
        attentions = [node for node in program.graph.nodes if is_attention(node) and is_over_tokens(program, node)]
        for node in attentions:
            kind = self._kind(program, node)
            mask = None
            if kind.reach is not None:
                if kind not in masks:
                    masks[kind] = _shared_mask(program, builder, kind)
                mask = masks[kind]
            queries, keys, values = (
                argument(node, "query"),
                _unrepeated(program, node, "key"),
                _unrepeated(program, node, "value"),
            )
            if _heads(keys) != _heads(values):  # repeated differently: cached as attention reads them
                keys, values = node.args[1:3]
            grouped = {"enable_gqa": True} if _heads(queries) != _heads(keys) else {}
            scale = argument(node, "scale")
            capped = {name: value for name, value in node.kwargs.items() if name == "softcap"}
            node.args = (queries, keys, values, mask, 0.0, mask is None, *node.args[6:])  # sinks and slopes, if any
            node.kwargs = {"scale": scale, **grouped, **capped}
            node.meta["mask"] = kind
        program.graph.eliminate_dead_code()
        renumber(program)  # both roads of capture end here, in the same text
        return len(attentions)

    def _kind(self, program: KVProgram, node: Node) -> Causal:
        """What a node's mask lets tokens see."""
        where = f"layer {layer_of(node)}: not an attention kvpass can cache"
        mask = argument(node, "attn_mask")
        if mask is None:
            if not argument(node, "is_causal"):
                raise UnsupportedModelError(
                    f"{where}: no mask and is_causal=False, tokens see the future ({node.name})"
                )
            return Causal()
        assert isinstance(mask, Node)
        kinds = [classify(allowed) for allowed in evaluations(program, mask, where)]
        bounded = {kind for kind in kinds if kind is not None and kind.reach is not None}
        if None in kinds or len(bounded) > 1:
            raise UnsupportedModelError(
                f"{where}: its mask {mask.name} is neither causal nor a sliding window nor chunks"
            )
        return bounded.pop() if bounded else Causal()


def _shared_mask(program: KVProgram, builder: GraphBuilder, kind: Causal) -> Node:
    def mask(input_ids: Tensor) -> Tensor:
        return prompt_mask(kind, input_ids.shape[1], input_ids.device)

    name = f"{'window' if isinstance(kind, Sliding) else 'chunk'}_{kind.reach}_mask"
    (node,) = builder.inline(mask, [program.input_node(Role.INPUT_IDS)], names=[name])
    return node


def _unrepeated(program: KVProgram, attention: Node, name: str) -> Node:
    """The keys or values before their heads were repeated for the queries."""
    node = argument(attention, name)
    assert isinstance(node, Node)
    source, found = node, node
    while source.op == "call_function" and len(source.all_input_nodes) >= 1:
        tensors = [n for n in source.all_input_nodes if isinstance(n.meta["val"], Tensor)]
        if len(tensors) != 1:
            break
        source = tensors[0]
        heads, wanted = _heads(source), _heads(node)
        if heads and heads < wanted and wanted % heads == 0 and _repeats(program, source, node, wanted // heads):
            found = source
            break
    return found


def _heads(node: object) -> int:
    value = node.meta["val"] if isinstance(node, Node) else None
    return (
        int(value.shape[1]) if isinstance(value, Tensor) and value.dim() == 4 and isinstance(value.shape[1], int) else 0
    )


def _repeats(program: KVProgram, source: Node, repeated: Node, times: int) -> bool:
    """Whether `repeated` is `source` with every head given `times` times, tried on random numbers."""
    heads, width = (int(source.meta["val"].shape[i]) for i in (1, 3))
    sample = torch.randn(2, heads, 5, width, dtype=torch.float32).to(source.meta["val"].dtype)
    (result,) = Subgraph((source,), (repeated,)).run({source: sample}, program.shapes.bind(B=2, S=5))
    return torch.equal(result, sample.repeat_interleave(times, dim=1))
