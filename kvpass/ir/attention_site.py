"""Where the attention of each layer is."""

from dataclasses import dataclass

import torch
from torch.fx import Node

from kvpass.ir.attention_op import ATTENTION
from kvpass.ir.masks import Causal
from kvpass.ir.program import KVProgram
from kvpass.ir.subgraph import argument
from kvpass.ir.symbols import Size

SDPA = torch.ops.aten.scaled_dot_product_attention.default
EXTRAS = ("softcap", "sinks", "slopes")  # what only `kvpass::attention` has


@dataclass(frozen=True)
class SiteMark:
    """What `locate-attention` writes into `node.meta["site"]` of an attention node."""

    layer: int
    holder: int
    path: str
    mask: Causal


@dataclass(frozen=True)
class AttentionSite:
    """One located attention. Derived anew from the graph after every change, never carried across one."""

    layer: int
    holder: int  # the layer whose cache has the keys and values: an earlier one if that has the same
    path: str  # module path, e.g. model.layers.3.self_attn
    mask: Causal  # which tokens a token sees
    node: Node  # the attention node, [B, H, S, D]
    queries: Node  # [B, H, S, D], after RoPE
    keys: Node  # [B, Hkv, S, D], after RoPE
    values: Node  # [B, Hkv, S, D]
    scale: float
    softcap: float | None  # scores end there, by tanh
    sinks: Node | None  # [H], what takes part in the softmax beside the keys
    slopes: Node | None  # [H], ALiBi: added to a score for each token that the key lies further on

    @property
    def extras(self) -> dict[str, Node]:
        """The tensors beside queries, keys and values that its attention reads."""
        named = {"sinks": self.sinks, "slopes": self.slopes}
        return {name: node for name, node in named.items() if node is not None}

    @property
    def tracks_positions(self) -> bool:
        """Whether the cache must say where in the text an entry was: scores depend on it, and entries are dropped."""
        return self.slopes is not None and not self.bounded

    @property
    def bounded(self) -> bool:
        """Whether it is a layer of windows or chunks, which keeps what it can see."""
        return self.mask.reach is not None

    @property
    def holds_cache(self) -> bool:
        """Whether keys and values are in a cache of its own."""
        return self.holder == self.layer

    @property
    def pressable(self) -> bool:
        """Whether a press can drop something; keys that layers share are pressed in the first of them."""
        return self.holds_cache and not self.bounded

    def shape(self, tap: Node) -> tuple[Size, ...]:
        return tuple(tap.meta["val"].shape)


def is_attention(node: Node) -> bool:
    """Whether a node is attention in the normal form."""
    return node.target in (SDPA, ATTENTION)


def is_over_tokens(program: KVProgram, node: Node) -> bool:
    """Whether an attention's queries and keys are [B, heads, S, D]."""
    shapes = [argument(node, name).meta["val"].shape for name in ("query", "key")]  # type: ignore[attr-defined]
    return all(len(shape) == 4 and program.shapes.text(shape[2]) == "S" for shape in shapes)


def attention_sites(program: KVProgram) -> list[AttentionSite]:
    """The marked attention nodes in layer order."""
    return sorted(
        (_site(node, node.meta["site"]) for node in program.graph.nodes if "site" in node.meta),
        key=lambda site: site.layer,
    )


def _site(node: Node, mark: SiteMark) -> AttentionSite:
    queries, keys, values = (argument(node, name) for name in ("query", "key", "value"))
    assert isinstance(queries, Node) and isinstance(keys, Node) and isinstance(values, Node)
    softcap, sinks, slopes = (argument(node, n) if node.target is ATTENTION else None for n in EXTRAS)
    scale = argument(node, "scale")
    head_size = queries.meta["val"].shape[-1]
    return AttentionSite(
        layer=mark.layer,
        holder=mark.holder,
        path=mark.path,
        mask=mark.mask,
        node=node,
        queries=queries,
        keys=keys,
        values=values,
        scale=float(scale) if isinstance(scale, int | float) else float(head_size) ** -0.5,
        softcap=float(softcap) if isinstance(softcap, int | float) else None,
        sinks=sinks if isinstance(sinks, Node) else None,
        slopes=slopes if isinstance(slopes, Node) else None,
    )
