"""Read keys and values at the speed of memory where a single token attends to them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from kvpass.ir.builder import GraphBuilder, cast
from kvpass.ir.form import Form
from kvpass.ir.program import KVProgram, layer_of
from kvpass.ir.subgraph import argument
from kvpass.pass_manager import Pass

QUERIES = 8  # of one KV head; with more of them a matrix product reads no more often than they do
CHANNELS = 16  # float32 numbers in the widest vector register
SUMS = 16  # of such registers that are added up at once, half of those there are
BLOCK = 64  # slots; what is left over then is never none or one in storage that a cache grows by itself
PARTS = 8  # of whole blocks; 2 and 16 were about as fast


@dataclass(frozen=True)
class StreamCache(Pass):
    """Write attention of one token as products and sums, which inductor fuses into loops that read a pair once.

    before:  scaled_dot_product_attention: f32[1, 2, 2, 16] = scaled_dot_product_attention(flatten, keys_out_0, ...)
    after:   as_strided: f32[1, 2, 2, 16] = as_strided(mul(flatten, 0.25), [1, 2, 2, 16], [64, 32, 16, 1])
             stack: f32[1, 2, 2, C_0] = stack([sum(mul(keys_out_0, slice(as_strided, 2, 0, 1)), [-1]), ...], 2)
             exp: f32[1, 2, 2, C_0] = exp(sub(where(mask, stack, -inf), amax(...)))
             stack_1: f32[1, 2, 2, 16] = stack([sum(mul(exp, values_out_0), [2]), ...], 2)
             streamed_attention_0: f32[1, 2, 2, 16] = div(stack_1, sum(exp, [3]))

    Values of 32 bits are summed in as many columns as fit into vector registers side by side, as one sum a column would
    walk over them once for each; those of 16 bits in parts, too. What a softmax divides by is divided by at the end,
    not once a pair. Sums are in float32.
    """

    name: ClassVar[str] = "stream-cache"
    requires: ClassVar[Form] = Form.LOWERED
    produces: ClassVar[Form] = Form.LOWERED

    def run(self, program: KVProgram) -> int:
        builder = GraphBuilder(program, self.name)
        found = [node for node in program.graph.nodes if _streams(node)]
        for node in found:
            tensors = [
                n for name in ("query", "key", "value", "attn_mask") if isinstance(n := argument(node, name), Node)
            ]
            scale = argument(node, "scale")
            assert isinstance(scale, float | None)
            (out,) = builder.inline(
                attention(scale),
                tensors,
                names=["streamed_attention"],
                layer=layer_of(node),
                like=node,
                key=(attention, scale),
            )
            node.replace_all_uses_with(out)
            program.graph.erase_node(node)
        return len(found)


def _streams(node: Node) -> bool:
    """Whether it is the attention of a few queries for each KV head."""
    if node.target is not torch.ops.aten.scaled_dot_product_attention.default:
        return False
    query, key, mask = (argument(node, name) for name in ("query", "key", "attn_mask"))
    assert isinstance(query, Node) and isinstance(key, Node)
    batch, heads, queries, _ = query.meta["val"].shape
    masked = mask is None or (isinstance(mask, Node) and mask.meta["val"].dtype == torch.bool)
    alike = batch == 1 and heads == key.meta["val"].shape[1] and not argument(node, "is_causal")
    return masked and alike and isinstance(queries, int) and queries <= QUERIES


def attention(scale: float | None) -> Callable[..., Tensor]:
    """Of queries [1, Hkv, R, D] to keys [1, Hkv, C, D] and values [1, Hkv, C, Dv], with a mask [1, 1 or Hkv, R, C]"""

    def attended(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        rows = range(query.shape[2])
        query, key, summands = (cast(tensor, torch.float32) for tensor in (query, key, value))
        scaled = _computed_once(query * (query.shape[3] ** -0.5 if scale is None else scale))
        scores = torch.stack([(key * scaled[:, :, row : row + 1]).sum(dim=-1) for row in rows], dim=2)
        if mask is not None:
            scores = torch.where(mask, scores, float("-inf"))
        powers = torch.exp(scores - scores.amax(dim=-1, keepdim=True)).unsqueeze(-1)
        sums = (_sums_of_columns if value.itemsize == 4 else _sums_of_parts)(powers, summands)
        return cast(sums / powers.sum(dim=3), value.dtype)

    return attended


def _computed_once(tensor: Tensor) -> Tensor:
    """The same numbers as memory that was written: of a strided view inductor makes it.

    Else it rotates the query again for each key: 437 instead of 292 us at 4,424 slots in bfloat16 (3 KV heads of 64).
    """
    dense = tensor.contiguous()
    return dense.as_strided(dense.shape, dense.stride())


def _sums_of_columns(weights: Tensor, values: Tensor) -> Tensor:
    """Of weights [..., R, C, 1] and values [..., C, Dv] the sums [..., R, Dv]."""
    rows, channels, width = range(weights.shape[-3]), values.shape[-1], CHANNELS
    while channels * len(rows) > SUMS * width:
        width *= 2
    columns = values.split(width if channels % width == 0 else channels, dim=-1)
    return torch.stack(
        [torch.cat([(weights[..., row, :, :] * column).sum(dim=-2) for column in columns], dim=-1) for row in rows],
        dim=-2,
    )


def _sums_of_parts(weights: Tensor, values: Tensor) -> Tensor:
    """The same of [1, Hkv, ...], slots in parts, so that threads have equal shares of three KV heads, too."""
    whole = values.shape[2] // BLOCK * BLOCK
    length = whole // PARTS
    part_weights = weights[:, :, :, :whole].unflatten(3, (PARTS, length)).transpose(2, 3)
    sums = _sums_of_columns(part_weights, values[:, :, :whole].unflatten(2, (PARTS, length))).sum(dim=2)
    return sums + _sums_of_columns(weights[:, :, :, whole:], values[:, :, whole:])
