"""Compute for the last token alone what nobody reads of the others."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import sympy
from torch import Tensor
from torch.fx import Node

from kvpass.ir.builder import GraphBuilder
from kvpass.ir.form import Form
from kvpass.ir.program import KVProgram, Role
from kvpass.ir.propagate import refresh_values
from kvpass.ir.symbols import expression
from kvpass.ir.token_axis import narrow, needed, shape_of
from kvpass.pass_manager import Pass


@dataclass(frozen=True)
class NarrowToLastToken(Pass):
    """Narrow all that only the logits of the last token need: of the last layer everything but its keys and values.

    before:  linear_7: f32[B, S, 64] = linear(mul_11, q_proj.weight)           # and so on until the logits
             attention_1: f32[B, 4, S, 16] = scaled_dot_product_attention(add_8, add_9, values, None, 0.0, True)
    after:   last: f32[B, 1, 64] = slice(mul_11, 1, -1, end)
             linear_7: f32[B, 1, 64] = linear(last, q_proj.weight)
             attention_1: f32[B, 4, 1, 16] = scaled_dot_product_attention(add_8, add_9, values, None, 0.0, False)

    Backwards from the logits: a node is narrowed if all that read it need its last token alone, and its operator is
    known to keep tokens apart. Where a narrowed node reads one that is not, the last token is sliced off. Behind the
    press and the writes to the cache, which are readers like others, and in front of `lower-attention`.
    """

    name: ClassVar[str] = "narrow-to-last-token"
    requires: ClassVar[Form] = Form.LOWERED
    produces: ClassVar[Form] = Form.LOWERED

    def run(self, program: KVProgram) -> int:
        tokens = expression(program.shapes["S"])
        if shape_of(program.output_value(Role.LOGITS))[1] != tokens:
            return 0
        builder = GraphBuilder(program, self.name)
        axes, reads = _demand(program, tokens)
        ends: dict[tuple[Node, int], Node] = {}
        for reader, places in sorted(reads.items()):
            for source, axis in places.items():
                if source in axes:
                    continue
                if (source, axis) not in ends:
                    (ends[source, axis],) = builder.inline(last_along(axis), [source], names=["last"], like=reader)
                reader.replace_input_with(source, ends[source, axis])
        for node, axis in axes.items():
            narrow(node, axis, tokens)
        refresh_values(program, axes)
        program.graph.eliminate_dead_code()  # sizes; writes to the cache are kept
        return len(axes) + len(ends)


def last_along(axis: int) -> Callable[[Tensor], Tensor]:
    def last(states: Tensor) -> Tensor:
        """[..., S, ...] -> [..., 1, ...]"""
        return states[(*[slice(None)] * axis, slice(-1, None))]

    return last


def _demand(program: KVProgram, tokens: sympy.Expr) -> tuple[dict[Node, int], dict[Node, dict[Node, int]]]:
    """The axis of tokens of the nodes to narrow, and what they, and the output, need the last token of along an axis.

    What is needed of a node that stays is sliced off. Where that cannot be done (a tuple, the tokens of several rows
    along one axis), its reader stays as well.
    """
    staying: set[Node] = set()
    while True:
        axes: dict[Node, int] = {}
        reads = {program.output_node(): {program.output_value(Role.LOGITS): 1}}
        for node in reversed(program.graph.nodes):
            wanted = {reads.get(user, {}).get(node) for user in node.users} if node not in staying else set()
            axis = wanted.pop() if len(wanted) == 1 else None
            if axis is not None and (places := needed(node, axis, tokens)) is not None:
                axes[node], reads[node] = axis, places
        stuck = {
            reader
            for reader, places in reads.items()
            for source, axis in places.items()
            if source not in axes and not _can_be_sliced(source, axis, tokens)
        }
        if not stuck:
            return axes, reads
        staying |= stuck


def _can_be_sliced(node: Node, axis: int, tokens: sympy.Expr) -> bool:
    return isinstance(node.meta["val"], Tensor) and shape_of(node)[axis] == tokens
