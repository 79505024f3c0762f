"""Passes, and the manager that runs, verifies, times, prints and dumps them."""

import logging
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from kvpass.errors import VerificationError
from kvpass.ir.form import Form
from kvpass.ir.printer import graph_text
from kvpass.ir.program import KVProgram
from kvpass.ir.verifier import verify

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pass(ABC):
    """One rewrite of a program's graph. A pass may assume a valid graph and must leave one; in between it may do
    as it likes. Its fields are its options."""

    name: ClassVar[str]
    requires: ClassVar[Form]
    produces: ClassVar[Form]

    @abstractmethod
    def run(self, program: KVProgram) -> int:
        """Rewrite the graph in place and return how many places were rewritten."""


@dataclass(frozen=True)
class PassRecord:
    """What one pass did, as measured by the manager."""

    name: str
    matches: int
    nodes_added: int
    nodes_removed: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.name:<22}{self.matches:>5} matches  +{self.nodes_added} -{self.nodes_removed} nodes  "
            f"{self.seconds * 1e3:.0f} ms"
        )


class PassManager:
    """Runs passes in the order given.

    Environment: `KVPASS_PRINT_IR` prints the graph behind every pass (`all`) or behind the passes named, separated by
    commas; `KVPASS_DUMP_DIR` writes it to `NNN_pass_phase.txt` files there; `KVPASS_VERIFY=full` recomputes every
    fake value behind every pass.
    """

    def __init__(self, passes: Sequence[Pass], *, print_ir: str | Callable[[str, str], None] | None = None) -> None:
        self.passes = tuple(passes)
        self.records: list[PassRecord] = []
        self._print_ir = print_ir if print_ir is not None else os.environ.get("KVPASS_PRINT_IR", "")
        self._dump_dir = os.environ.get("KVPASS_DUMP_DIR")
        self._recompute = os.environ.get("KVPASS_VERIFY") == "full"

    def run(self, program: KVProgram) -> KVProgram:
        """Transform a copy of `program`; the one given is not changed."""
        program = program.copy()
        for index, step in enumerate(self.passes):
            if not step.requires <= program.form <= step.produces:
                raise VerificationError(
                    f"pass {step.name!r} takes {step.requires.name} to {step.produces.name}, found {program.form.name} "
                    f"(so far: {', '.join(program.history) or 'nothing'})"
                )
            before, start = set(program.graph.nodes), time.perf_counter()
            try:
                matches = step.run(program)
            except Exception as error:
                error.add_note(f"in pass {step.name!r}, after {', '.join(program.history) or 'capture'}")
                raise
            after = set(program.graph.nodes)
            program.form = step.produces
            program.history = (*program.history, step.name)
            seconds = time.perf_counter() - start
            verify(program, recompute=self._recompute)
            record = PassRecord(step.name, matches, len(after - before), len(before - after), seconds)
            self.records.append(record)
            log.info("%s", record)
            self._show(index, step, program)
        program.graph_module.recompile()
        return program

    def _show(self, index: int, step: Pass, program: KVProgram) -> None:
        phase = program.phase.value if program.phase else "all"
        if callable(self._print_ir):
            self._print_ir(step.name, graph_text(program))
        elif self._print_ir and ("all" in self._print_ir or step.name in self._print_ir.split(",")):
            log.warning("after %s (%s):\n%s", step.name, phase, graph_text(program))
        if self._dump_dir:
            path = Path(self._dump_dir) / f"{index:03d}_{step.name}_{phase}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(graph_text(program))
