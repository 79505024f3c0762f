"""Where the attention of each layer is."""

from dataclasses import dataclass

import torch
from torch.fx import Node

from kvpass.ir.masks import Causal
from kvpass.ir.program import KVProgram
from kvpass.ir.subgraph import argument
from kvpass.ir.symbols import Size

SDPA = torch.ops.aten.scaled_dot_product_attention.default


@dataclass(frozen=True)
class SiteMark:
    """What `locate-attention` writes into `node.meta["site"]` of an SDPA node."""

    layer: int
    path: str
    mask: Causal


@dataclass(frozen=True)
class AttentionSite:
    """One located attention. Derived anew from the graph after every change, never carried across one."""

    layer: int
    path: str  # module path, e.g. model.layers.3.self_attn
    mask: Causal  # which tokens a token sees
    node: Node  # the SDPA node, [B, H, S, D]
    queries: Node  # [B, H, S, D], after RoPE
    keys: Node  # [B, Hkv, S, D], after RoPE
    values: Node  # [B, Hkv, S, D]
    scale: float

    @property
    def pressable(self) -> bool:
        """Layers of windows or chunks are bounded already and keep what they can see."""
        return self.mask.reach is None

    def shape(self, tap: Node) -> tuple[Size, ...]:
        return tuple(tap.meta["val"].shape)


def attention_sites(program: KVProgram) -> list[AttentionSite]:
    """The marked SDPA nodes in layer order."""
    return sorted(
        (_site(node, node.meta["site"]) for node in program.graph.nodes if "site" in node.meta),
        key=lambda site: site.layer,
    )


def _site(node: Node, mark: SiteMark) -> AttentionSite:
    queries, keys, values = (argument(node, name) for name in ("query", "key", "value"))
    assert isinstance(queries, Node) and isinstance(keys, Node) and isinstance(values, Node)
    scale = argument(node, "scale")
    head_size = queries.meta["val"].shape[-1]
    return AttentionSite(
        layer=mark.layer,
        path=mark.path,
        mask=mark.mask,
        node=node,
        queries=queries,
        keys=keys,
        values=values,
        scale=float(scale) if isinstance(scale, int | float) else float(head_size) ** -0.5,
    )
