"""Write out the attention that no backend knows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.fx import Node

from kvpass.ir.attention_op import ATTENTION, prompt_attention
from kvpass.ir.builder import GraphBuilder
from kvpass.ir.form import Form
from kvpass.ir.program import KVProgram, layer_of
from kvpass.ir.subgraph import argument
from kvpass.pass_manager import Pass

TENSORS = ("query", "key", "value", "attn_mask", "sinks", "slopes")


@dataclass(frozen=True)
class LowerAttention(Pass):
    """Replace attention with a soft-cap, sinks or slopes by products and a softmax.

    before:  attention_0: f32[B, 4, S, 16] = kvpass.attention(add_1, add_2, transpose_2, None, 0.0, True, softcap=50.0)
    after:   attended_0: f32[B, 4, S, 16] = matmul(softmax(masked_fill(..., -inf), -1), transpose_2)

    Behind the press, which finds the attention by its node.
    """

    name: ClassVar[str] = "lower-attention"
    requires: ClassVar[Form] = Form.LOWERED
    produces: ClassVar[Form] = Form.LOWERED

    def run(self, program: KVProgram) -> int:
        builder = GraphBuilder(program, self.name)
        found = [node for node in program.graph.nodes if node.target is ATTENTION]
        for node in found:
            site = node.meta.get("site")
            layer = site.layer if site is not None else layer_of(node)
            given = {name: n for name in TENSORS if isinstance(n := argument(node, name), Node)}
            (out,) = builder.inline(
                _written_out(node, tuple(given)),
                list(given.values()),
                names=["attended"],
                layer=layer,
                like=node,
            )
            node.replace_all_uses_with(out)
            program.graph.erase_node(node)
        return len(found)


def _written_out(node: Node, names: Sequence[str]) -> Callable[..., Tensor]:
    """The node's computation as a function of those of its tensors that are there."""
    is_causal, scale, softcap = (argument(node, name) for name in ("is_causal", "scale", "softcap"))
    assert isinstance(is_causal, bool) and isinstance(scale, float | None) and isinstance(softcap, float | None)

    def attended(*tensors: Tensor) -> Tensor:
        given = dict(zip(names, tensors, strict=True))
        return prompt_attention(
            given["query"],
            given["key"],
            given["value"],
            given.get("attn_mask"),
            is_causal=is_causal,
            scale=scale,
            softcap=softcap,
            sinks=given.get("sinks"),
            slopes=given.get("slopes"),
        )

    return attended
