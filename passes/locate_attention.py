"""Say which attention belongs to which layer, or why the model cannot be compiled."""

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Node

from kvpass.errors import UnsupportedModelError
from kvpass.ir.attention_site import SiteMark, is_attention, is_over_tokens
from kvpass.ir.form import Form
from kvpass.ir.program import KVProgram
from kvpass.ir.subgraph import argument
from kvpass.ir.written_attention import unmatched
from kvpass.pass_manager import Pass


@dataclass(frozen=True)
class LocateAttention(Pass):
    """Mark every attention over the tokens with its layer, module path and mask. The graph text does not change.

    Layers are counted in the order of the graph: a module that is called twice has a cache for each call. A layer that
    reads the keys and values of an earlier one, under the same mask, has no cache of its own. Attention over something
    else than the tokens is left alone; `prove-token-local` proves that it needs no cache.
    """

    name: ClassVar[str] = "locate-attention"
    requires: ClassVar[Form] = Form.NORMAL
    produces: ClassVar[Form] = Form.LOCATED

    def run(self, program: KVProgram) -> int:
        attentions = [node for node in program.graph.nodes if is_attention(node) and is_over_tokens(program, node)]
        if not attentions:
            raise UnsupportedModelError(
                "no attention found: the graph has no scaled_dot_product_attention over tokens, [B, heads, S, D], and "
                f"nothing that computes the same{unmatched(program)}. kvpass compresses key/value caches; let the "
                "model call torch.nn.functional.scaled_dot_product_attention"
            )
        if all("site" in node.meta for node in attentions):
            return 0
        holders: dict[object, int] = {}
        for layer, node in enumerate(attentions):
            mask = node.meta.pop("mask")
            holder = holders.setdefault((argument(node, "key"), argument(node, "value"), mask), layer)
            node.meta["site"] = SiteMark(layer, holder, _module_path(node), mask)
            node._rename(f"attention_{layer}")
        program.layer_count = len(attentions)
        return len(attentions)


def _module_path(node: Node) -> str:
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return str(stack[-1][0]).removeprefix("model.") if stack else ""
