"""The model's own RoPE at other positions: its captured subgraph, run again."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from kvpass.ir.program import KVProgram
from kvpass.ir.subgraph import Subgraph

aten = torch.ops.aten
LOOKUPS = (aten.embedding.default, aten.index_select.default, aten.index.Tensor, aten.gather.default)


@dataclass(frozen=True)
class Rotation:
    """RoPE as it stands in the graph: from positions to frequencies, from states and frequencies to rotated states."""

    pre: Node  # [B, heads, S, D], or [B, S, heads, D]
    table: Subgraph  # position_ids -> frequencies
    apply: Subgraph  # pre, *frequencies -> post, which is [B, heads, S, D]
    token_major: bool = False  # whether `pre` is [B, S, heads, D]

    def turned(self, states: Tensor) -> Tensor:
        """States as `pre` has them from [B, heads, S, D], or back."""
        return states.transpose(1, 2) if self.token_major else states

    @property
    def heads(self) -> int:
        return int(self.pre.meta["val"].shape[2 if self.token_major else 1])

    def fingerprint(self) -> str:
        return f"{self.table.fingerprint()} | {self.apply.fingerprint()}"

    @property
    def constants(self) -> list[Node]:
        """The attributes that the table and the rotation read, such as inverse frequencies."""
        leaves = dict.fromkeys([*self.table.leaves(), *self.apply.leaves()])
        return [node for node in leaves if node.op == "get_attr"]


@dataclass(frozen=True)
class GraphRope:
    """A `Rope` (see kvpass.press) over the rotation found in a graph, scaling and partial rotation included.

    `constants` are the values of the attributes that the rotation reads.
    """

    program: KVProgram
    rotation: Rotation
    constants: Mapping[Node, Tensor]

    def frequencies(self, positions: Tensor) -> tuple[Tensor, ...]:
        """positions i64[B or 1, P]; the layout of the result is the model's.

        A table that is looked up ends where the model's texts do; positions behind that count as its last one.
        """
        if any(node.target in LOOKUPS for node in self.rotation.table.body):
            positions = positions.clamp(max=self.program.max_tokens - 1)
        sizes = self.program.shapes.bind(B=positions.shape[0], S=positions.shape[1])
        (source,) = self.rotation.table.inputs
        return self.rotation.table.run({source: positions, **self.constants}, sizes)

    def average(self, frequencies: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The mean over positions, kept as a size of 1."""
        axes = [self._length_axis(node) for node in self.rotation.table.outputs]
        return tuple(t.mean(dim=axis, keepdim=True) for t, axis in zip(frequencies, axes, strict=True))

    def rotate(self, states: Tensor, frequencies: tuple[Tensor, ...]) -> Tensor:
        """states [B, heads, P, D]; one head stands for all where the graph reshapes for its number of heads."""
        heads = self.rotation.heads
        if states.shape[1] == 1 != heads and any(self._names(node, heads) for node in self.rotation.apply.body):
            return self.rotate(states.expand(-1, heads, -1, -1), frequencies)[:, :1]
        sizes = self.program.shapes.bind(B=states.shape[0], S=states.shape[2])
        given = dict(zip(self.rotation.apply.inputs, (self.rotation.turned(states), *frequencies), strict=True))
        (rotated,) = self.rotation.apply.run({**given, **self.constants}, sizes)
        return rotated

    def _names(self, node: Node, heads: int) -> bool:
        """Whether a node's sizes say how many heads there are."""
        return any(isinstance(arg, list | tuple) and heads in arg for arg in node.args)

    def _length_axis(self, node: Node) -> int:
        text = self.program.shapes.text
        return [text(size) for size in node.meta["val"].shape].index("S")
