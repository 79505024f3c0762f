"""The phase graphs of one captured model: built when first needed, shared by all models compiled from it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from kvpass.backends import Runner, make_runner
from kvpass.backends.engine_sizes import EngineSizes
from kvpass.graph_store import GraphStore, name_of, passes_are_watched
from kvpass.ir.program import STORED, KVProgram, Port
from kvpass.pass_manager import Pass, PassManager, PassRecord

SHARED = 2  # passes before the press; they ask it only how long its prompts are
PrintIR = str | Callable[[str, str], None] | None


@dataclass(frozen=True)
class PhaseGraph:
    """One lowered graph and the callable that runs it."""

    program: KVProgram
    records: Sequence[PassRecord]
    run: Runner = field(repr=False)

    @cached_property
    def per_call(self) -> tuple[tuple[int, Port], ...]:
        """The inputs that are other tensors at every call, with their places; all but the storage of the cache."""
        return tuple((place, port) for place, port in enumerate(self.program.inputs) if port.role not in STORED)

    @cached_property
    def axes(self) -> int:
        """How many positions a token has; asked at every token, where the program would look through its nodes."""
        return self.program.axes

    @cached_property
    def returned(self) -> tuple[tuple[int, Port], ...]:
        """The outputs that must be stored in the cache, with their places; none where the graph writes to it."""
        return tuple((place, port) for place, port in enumerate(self.program.outputs) if port.role in STORED)


@dataclass
class PhaseGraphs:
    """Only the prefill graph knows the press: whoever compiles a second press compiles that graph alone."""

    located: KVProgram
    store: GraphStore | None = None
    _built: dict[object, PhaseGraph] = field(default_factory=dict, init=False, repr=False)
    _begun: dict[object, tuple[KVProgram, Sequence[PassRecord]]] = field(default_factory=dict, init=False, repr=False)

    def get(
        self,
        steps: tuple[Pass, ...],
        backend: str | Callable[..., Any],
        mode: str | None,
        print_ir: PrintIR = None,
        sizes: EngineSizes | None = None,
    ) -> PhaseGraph:
        """What the passes of a phase make, handed to the backend, at its first mention. sizes: see `make_runner`."""
        key = (steps, backend, mode, sizes)
        if key not in self._built:
            program, records = self.made(steps, print_ir)
            self._built[key] = PhaseGraph(program, records, make_runner(program, backend, mode, sizes))
        return self._built[key]

    def made(self, steps: Sequence[Pass], print_ir: PrintIR) -> tuple[KVProgram, list[PassRecord]]:
        """What the passes make of the located graph, in this process or in an earlier one."""
        name = name_of(steps) if self.store is not None and print_ir is None else None
        if self.store is not None and name is not None and (stored := self.store.load(name)) is not None:
            return stored
        shared = 0 if print_ir is not None or passes_are_watched() else SHARED
        program, before = self._begun_with(steps[:shared])
        manager = PassManager(steps[shared:], print_ir=print_ir)
        program, records = manager.run(program), [*before, *manager.records]
        if self.store is not None and name is not None:
            self.store.save(name, program, records)
        return program, records

    def _begun_with(self, steps: Sequence[Pass]) -> tuple[KVProgram, Sequence[PassRecord]]:
        """What the first passes make of the located graph, once for all presses that have them in common."""
        key = tuple(steps)
        if not key:
            return self.located, ()
        if key not in self._begun:
            manager = PassManager(steps)
            self._begun[key] = (manager.run(self.located), manager.records)
        return self._begun[key]
