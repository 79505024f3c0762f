"""Run the lowered graphs of a model by hand, over buffers that stand for the cache."""

import torch
from torch import Tensor

from kvpass.ir.form import Phase
from kvpass.ir.program import KVProgram, Role
from kvpass.pass_manager import PassManager
from kvpass.pipeline import phase_passes
from kvpass.press import Press


class GraphRun:
    """One text, read by the graphs of all phases; with a press each layer keeps `keep` pairs of its first tokens."""

    def __init__(
        self, located: KVProgram, batch: int, capacity: int, press: Press | None = None, keep: int = 0
    ) -> None:
        self.located, self.press, self.keep, self.capacity = located, press, keep, capacity
        self.batch, self.seen, self.stored = batch, 0, 0
        self.graphs: dict[Phase, KVProgram] = {}
        self.buffers: dict[str, Tensor] = {}

    def read(self, ids: Tensor) -> Tensor:
        """Logits of these tokens, those of the last one for the first of them."""
        phase = Phase.PREFILL if self.seen == 0 else Phase.DECODE if ids.shape[1] == 1 else Phase.EXTEND
        if phase not in self.graphs:
            self.graphs[phase] = PassManager(phase_passes(phase, self.press)).run(self.located)
        program = self.graphs[phase]
        inputs = []
        for port, node in zip(program.inputs, program.placeholders(), strict=True):
            match port.role:
                case Role.INPUT_IDS:
                    inputs.append(ids)
                case Role.POSITION_IDS:
                    inputs.append(torch.arange(self.seen, self.seen + ids.shape[1]).repeat(self.batch, 1))
                case Role.LENGTHS:
                    inputs.append(torch.full((program.layer_count, self.batch), self.stored))
                case Role.SIZE:
                    inputs.append(torch.empty(self.keep))
                case _:
                    value = node.meta["val"]
                    shape = [size if isinstance(size, int) else None for size in value.shape]
                    shape[0], shape[2] = self.batch, self.capacity
                    inputs.append(self.buffers.setdefault(port.name, torch.zeros(shape, dtype=value.dtype)))
        with torch.no_grad():
            logits = program.graph_module(*inputs)[0]
        self.stored += self.keep if self.press and self.seen == 0 else ids.shape[1]
        self.seen += ids.shape[1]
        return logits
