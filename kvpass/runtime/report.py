"""What a compiled model did to its graphs and to its last prompt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvpass.pass_manager import PassRecord


@dataclass(frozen=True)
class Report:
    """Printable; the fields are there for programs. Times in seconds, sizes in bytes."""

    passes: Mapping[str, Sequence[PassRecord]]  # by phase; "capture" for those that all phases share
    press: str
    budget: str
    seen_tokens: int  # of the last prompt; 0 before the first
    kept: Sequence[int]  # entries per KV head, by layer
    cache_bytes: int
    notes: Sequence[str] = ()  # what was decided at capture and changes results

    def __str__(self) -> str:
        lines = [f"press {self.press}, {self.budget}", *self.notes]
        for phase, records in self.passes.items():
            lines += [f"{phase}:", *(f"  {record}" for record in records)]
        if self.seen_tokens:
            lines.append(f"last prompt: {self.seen_tokens} tokens, cache {self.cache_bytes} bytes")
            lines += [f"  layer {layer:>3}: keeps {kept}" for layer, kept in enumerate(self.kept)]
        return "\n".join(lines)
