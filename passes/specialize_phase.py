"""Cut the graph of one phase from the capture."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvpass.ir.form import Form, Phase
from kvpass.ir.program import KVProgram
from kvpass.ir.propagate import assign_values
from kvpass.ir.symbols import SymbolicShapes
from kvpass.pass_manager import Pass


@dataclass(frozen=True)
class SpecializePhase(Pass):
    """Give the sizes the range of one phase; a decode graph has S = 1 and no size arithmetic left.

    before:  linear: f32[B, S, 64] = linear(mul_4, weight)
    after:   linear: f32[B, 1, 64] = linear(mul_4, weight)              # decode

    `min_tokens` is the shortest prompt that reaches the prefill graph: what a press slices off its end exists.
    `example_tokens` is the length that stands for S where a press asks which of two ways to go. `one_row` gives the
    batch its size, too.
    """

    name: ClassVar[str] = "specialize-phase"
    requires: ClassVar[Form] = Form.LOCATED
    produces: ClassVar[Form] = Form.SPECIALIZED

    phase: Phase
    min_tokens: int = 2
    example_tokens: int | None = None
    one_row: bool = False

    def run(self, program: KVProgram) -> int:
        shapes = SymbolicShapes()
        batch = shapes.fix("B", 1) if self.one_row else shapes.dim("B", hint=3)
        if self.phase is Phase.DECODE:
            tokens = shapes.fix("S", 1)
        else:
            low = self.min_tokens if self.phase is Phase.PREFILL else 2
            tokens = shapes.dim("S", hint=self.example_tokens or 2 * low + 61, low=low)
        program.shapes = shapes
        program.phase = self.phase
        devices = {node.target: node.meta["val"].device for node in program.placeholders()}
        assign_values(
            program,
            {name: shapes.empty((batch, tokens), torch.int64, device) for name, device in devices.items()},  # type: ignore[misc]
        )
        program.graph.eliminate_dead_code()
        return 1
