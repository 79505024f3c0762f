"""What the demo prints. Text of the model is never read as markup: it may hold brackets."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from kvpass.demo.context import Needle
from kvpass.demo.measure import Measured


@contextmanager
def step(console: Console, label: str) -> Iterator[None]:
    """Say what is going on, with a running clock on a terminal, and how many seconds it took."""
    start = time.perf_counter()
    if console.is_terminal:
        # The clock stands first: a narrow terminal cuts off the end.
        columns = (SpinnerColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
        with Progress(*columns, console=console, transient=True) as progress:
            progress.add_task(label, total=None)
            yield
    else:
        console.print(Text(f"{label} ..."), soft_wrap=True)
        yield
    console.print(Text(f"{label}: {time.perf_counter() - start:.1f} s", "dim"), soft_wrap=True)


def print_questions(console: Console, needles: Sequence[Needle], columns: dict[str, Measured]) -> None:
    """The answers side by side; an answer that lacks the right words is marked."""
    table = Table(title="Sentences to complete", title_justify="left")
    table.add_column("sentence")
    for name in columns:
        table.add_column(Text(name))
    for index, needle in enumerate(needles):
        answers = [measured.answers[index] for measured in columns.values()]
        cells = [Text(answer, "green" if needle.answer in answer else "red") for answer in answers]
        table.add_row(Text(f"{needle.prompt} ..."), *(_marked(cell, needle) for cell in cells))
    console.print(table)


def print_continuations(console: Console, columns: dict[str, Measured]) -> None:
    """How each model goes on with the text."""
    for name, measured in columns.items():
        console.print(Text(f"Continuation, {name}:", "bold"))
        console.print(Text(" ".join(measured.continuation.split())), "\n")


def print_numbers(
    console: Console,
    tokens: int,
    needles: Sequence[Needle],
    columns: dict[str, Measured],
) -> None:
    """The measured numbers side by side."""
    table = Table(title="Measured", title_justify="left")
    table.add_column()
    for name in columns:
        table.add_column(Text(name), justify="right")
    rows = {
        f"entries per KV head, of {tokens:,} tokens": [_span(m.kept) for m in columns.values()],
        "cache, used": [_mebibytes(m.used_bytes) for m in columns.values()],
        "cache, allocated": [_mebibytes(m.allocated_bytes) for m in columns.values()],
        "prefill": [f"{m.prefill_seconds:.2f} s" for m in columns.values()],
        "decode": [f"{m.decode_tokens_per_second:.1f} tokens/s" for m in columns.values()],
        "answers right": [f"{_right(m, needles)} of {len(needles)}" for m in columns.values()],
    }
    for label, cells in rows.items():
        table.add_row(label, *cells)
    console.print(table)


def _marked(answer: Text, needle: Needle) -> Text:
    return answer if needle.answer in answer.plain else answer.append("  (wrong)", "dim")


def _right(measured: Measured, needles: Sequence[Needle]) -> int:
    return sum(needle.answer in answer for needle, answer in zip(needles, measured.answers, strict=True))


def _span(kept: Sequence[int]) -> str:
    low, high = min(kept), max(kept)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}, by layer"


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
