"""Keep the best pairs of every pressed layer; only they reach the cache."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from kvpass.ir.attention_site import attention_sites
from kvpass.ir.builder import GraphBuilder
from kvpass.ir.form import Form
from kvpass.ir.program import KVProgram, Origin, Port, Role
from kvpass.pass_manager import Pass
from kvpass.passes.insert_kv_cache import store_prefix


@dataclass(frozen=True)
class SpliceEvict(Pass):
    """Select the N best of each KV head and write those instead of all.

    before:  keys_out_0: f32[B, 2, C, 16] = slice_scatter(keys_0, add_2, 2, 0, S)
    after:   kept_0: i64[B, 2, N] = ...                                  # from scores_0, ascending
             keys_kept_0: f32[B, 2, N, 16] = gather(add_2, 2, kept_0)
             keys_out_0: f32[B, 2, C, 16] = slice_scatter(keys_0, keys_kept_0, 2, 0, N)
    """

    name: ClassVar[str] = "splice-evict"
    requires: ClassVar[Form] = Form.SCORED
    produces: ClassVar[Form] = Form.COMPRESSED

    def run(self, program: KVProgram) -> int:
        builder = GraphBuilder(program, self.name)
        budget = program.input_node(Role.BUDGET)
        sites = {site.layer: site for site in attention_sites(program)}
        done = {port.layer for port in program.outputs if port.role is Role.KEPT}
        scored = [node for node in program.graph.nodes if _is_score(node) and node.meta["kvpass"].layer not in done]
        for scores in scored:
            site = sites[scores.meta["kvpass"].layer]
            (kept,) = builder.inline(
                select, [scores, budget], names=["kept"], layer=site.layer, like=site.node, key="select"
            )
            for role, source in ((Role.KEYS, site.keys), (Role.VALUES, site.values)):
                (held,) = builder.inline(
                    gather,
                    [source, kept],
                    names=[f"{role.value}_kept"],
                    layer=site.layer,
                    like=site.node,
                    key="gather",
                )
                old = program.output_value(role, site.layer)
                cache = program.input_node(role, site.layer)
                (new,) = builder.inline(
                    store_prefix,
                    [cache, held],
                    names=[f"{role.value}_stored"],
                    layer=site.layer,
                    like=site.node,
                )
                old.replace_all_uses_with(new)
                program.graph.erase_node(old)
            program.add_output(Port(f"kept_{site.layer}", Role.KEPT, site.layer), kept)
        return len(scored)


def select(scores: Tensor, budget: Tensor) -> Tensor:
    """The positions of the N best scores of each head, ascending; among equal scores the first win.

    scores [B, Hkv, S], budget f32[N] -> i64[B, Hkv, N]. topk finds the threshold only: which of equal scores it would
    take depends on the backend.
    """
    batch, heads, tokens = scores.shape
    count = budget.shape[0]
    threshold = scores.topk(count, dim=-1).values[..., -1:]
    better, equal = scores > threshold, scores == threshold
    room = count - better.sum(dim=-1, keepdim=True)
    keep = better | (equal & (equal.cumsum(dim=-1) <= room))
    rank = torch.where(keep, keep.cumsum(dim=-1) - 1, count)  # what is dropped goes to slot N and is cut off
    position = torch.arange(tokens, device=scores.device).expand(batch, heads, tokens)
    slots = position.new_zeros(batch, heads, count + 1)
    return slots.scatter(-1, rank, position)[..., :count]


def gather(states: Tensor, kept: Tensor) -> Tensor:
    """states [B, Hkv, S, D], kept i64[B, Hkv, N] -> [B, Hkv, N, D]."""
    return states.gather(2, kept[..., None].expand(-1, -1, -1, states.shape[-1]))


def _is_score(node: Node) -> bool:
    origin = node.meta.get("kvpass")
    return isinstance(origin, Origin) and origin.role == "scores"
