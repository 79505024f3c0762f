"""Say which attention belongs to which layer, or why the model cannot be compiled."""

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Node

from kvpass.errors import UnsupportedModelError
from kvpass.ir.attention_site import SiteMark, is_attention
from kvpass.ir.form import Form
from kvpass.ir.program import KVProgram, layer_of
from kvpass.ir.subgraph import argument
from kvpass.pass_manager import Pass


@dataclass(frozen=True)
class LocateAttention(Pass):
    """Mark the one SDPA node of every layer with its layer, module path and window. The graph text does not change.

    `expected_layers` is what the model's config promises; 0 takes what is there.
    """

    name: ClassVar[str] = "locate-attention"
    requires: ClassVar[Form] = Form.NORMAL
    produces: ClassVar[Form] = Form.LOCATED

    expected_layers: int = 0

    def run(self, program: KVProgram) -> int:
        attentions = [node for node in program.graph.nodes if is_attention(node)]
        if not attentions:
            raise UnsupportedModelError(
                "no attention found: the graph has no scaled_dot_product_attention node. kvpass compresses "
                "key/value caches; let the model call torch.nn.functional.scaled_dot_product_attention"
            )
        if self.expected_layers and len(attentions) != self.expected_layers:
            found = sorted({layer for node in attentions if (layer := layer_of(node)) is not None})
            missing = sorted(set(range(self.expected_layers)) - set(found))
            raise UnsupportedModelError(
                f"the config promises {self.expected_layers} layers, the graph has {len(attentions)} attentions "
                f"(no attention in layers {missing})"
            )
        if all("site" in node.meta for node in attentions):
            return 0
        for layer, node in enumerate(attentions):
            self._check(program, layer, node)
            node.meta["site"] = SiteMark(layer, _module_path(node), node.meta.pop("window"))
            node._rename(f"attention_{layer}")
        program.layer_count = len(attentions)
        return len(attentions)

    def _check(self, program: KVProgram, layer: int, node: Node) -> None:
        named = layer_of(node)
        if named is not None and named != layer:
            raise UnsupportedModelError(
                f"layer {layer}: its attention {node.name} was traced in {_module_path(node)!r}; layers that are "
                "called several times, or out of order, or that hold two attentions have no cache of their own"
            )
        queries, keys = argument(node, "query"), argument(node, "key")
        assert isinstance(queries, Node) and isinstance(keys, Node)
        for role, tensor in (("queries", queries), ("keys", keys)):
            shape = tensor.meta["val"].shape
            if len(shape) != 4 or program.shapes.text(shape[2]) != "S":
                sizes = [program.shapes.text(size) for size in shape]
                raise UnsupportedModelError(
                    f"layer {layer}: attention {node.name} is not over the tokens: {role} are {sizes}, "
                    "expected [B, heads, S, D]"
                )


def _module_path(node: Node) -> str:
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return str(stack[-1][0]).removeprefix("model.") if stack else ""
