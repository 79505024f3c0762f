"""What TensorRT would make of a compiled model, told before an engine is built."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from torch.export import ExportedProgram

from kvpass.backends.tensorrt.conversion import converters_of, lower
from kvpass.backends.tensorrt.library import library


@dataclass(frozen=True)
class Operator:
    """One kind of node in one phase."""

    phase: str
    name: str
    count: int
    converter: str | None  # the module that converts it; None: it would fall back to torch


@dataclass(frozen=True)
class TensorRTReport:
    """Printable; the fields are there for programs."""

    flavour: str
    version: str
    operators: tuple[Operator, ...]
    refused: tuple[str, ...] = ()  # why no engine can be built for a phase

    @property
    def fallbacks(self) -> tuple[Operator, ...]:
        """What has no converter."""
        return tuple(operator for operator in self.operators if operator.converter is None)

    def __str__(self) -> str:
        lines = [f"{self.flavour} {self.version}", *(f"refused: {reason}" for reason in self.refused)]
        for phase in dict.fromkeys(operator.phase for operator in self.operators):
            rows = [operator for operator in self.operators if operator.phase == phase]
            lines.append(f"{phase}: {sum(row.count for row in rows)} nodes, {_count_fallbacks(rows)} would fall back")
            lines += [f"  {row.count:>5} {row.name:<44}{row.converter or 'none: falls back'}" for row in rows]
        return "\n".join(lines)


def report(programs: Mapping[str, ExportedProgram], refused: tuple[str, ...] = ()) -> TensorRTReport:
    """The operators of lowered phases, those without a converter first. The programs are used up."""
    found: list[Operator] = []
    for phase, program in programs.items():
        converters = converters_of(lower(program))
        counts = Counter((str(node.target), converter) for node, converter in converters.items())
        rows = [Operator(phase, name, count, converter) for (name, converter), count in counts.items()]
        found += sorted(rows, key=lambda row: (row.converter is not None, -row.count, row.name))
    return TensorRTReport(library().flavour, library().version, tuple(found), refused)


def _count_fallbacks(rows: list[Operator]) -> int:
    return sum(row.count for row in rows if row.converter is None)
