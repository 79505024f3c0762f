"""The results as a table and as a picture."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from kvpass.bench.floor import Hardware
from kvpass.errors import InputError

if TYPE_CHECKING:
    from kvpass.bench.run import Row, Settings

MIB = 2**20


def print_table(console: Console, settings: "Settings", hardware: Hardware, rows: "Sequence[Row]") -> None:
    """Medians; ratios against the floor in brackets."""
    subject = settings.model or settings.shape
    table = Table(
        title=f"{subject}, {settings.dtype}, {settings.device}, {settings.context:,} tokens, then "
        f"{settings.new_tokens}; {', '.join(settings.presses)}, ratio {settings.ratio:g}"
    )
    table.add_column("")
    for column in ("prefill s", "first token s", "decode tok/s", "x floor", "peak MiB", "cache MiB", "compile s"):
        table.add_column(column, justify="right")
    for row in rows:
        if row.failure:
            table.add_row(row.name, f"failed: {row.failure}")
            continue
        peak = row.samples[-1].peak
        warm = "" if row.warm is None else f" / {max(row.warm, 0):.1f}"
        table.add_row(
            row.name,
            f"{row.of('prefill'):.2f}",
            f"{row.of('first_token'):.2f}",
            f"{1 / row.of('step'):.1f}",
            f"{row.of('step') / row.decode_floor:.2f}",
            f"{row.of('peak') / MIB:,.0f}" if peak is not None else "",
            f"{row.of('allocated_bytes') / MIB:,.0f}",
            f"{max(row.cold, 0):.1f}{warm}",
        )
    console.print(table)
    measured = next((row for row in rows if row.samples), None)
    console.print(
        f"Memory reads {hardware.bandwidth / 1e9:.0f} GB/s, matrices multiply at "
        f"{hardware.matrix_rate / 1e9:.0f} GFLOP/s"
        + (f"; a prefill multiplies for {measured.prefill_floor:.2f} s at least" if measured else "")
        + f".\nMedians of {settings.repeats} runs, one subject after the other in turns. x floor: the decode step over "
        "the time to read weights and kept pairs once.\nCompile: until the first run is done, cold / in a second "
        "process.",
        style="dim",
        highlight=False,
    )


def need_matplotlib() -> None:
    """Raises `InputError` before anything is measured if pictures cannot be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("--plot draws with matplotlib, which is not installed: pip install 'kvpass[plot]'")


def plot(settings: "Settings", rows: "Sequence[Row]", path: Path) -> None:
    """Prefill seconds, milliseconds per decoded token with its floor, and peak memory, as bars."""
    from matplotlib.figure import Figure

    shown = [row for row in rows if row.samples]
    names = [row.name for row in shown][::-1]
    figure = Figure(figsize=(12, 0.5 * len(shown) + 2), layout="constrained")
    figure.suptitle(f"{settings.model or settings.shape}, {settings.dtype}, {settings.context:,} tokens")
    panels = figure.subplots(1, 3, sharey=True)
    series = [
        ("prefill, s", [row.of("prefill") for row in shown]),
        ("decode, ms per token", [1e3 * row.of("step") for row in shown]),
        ("peak memory, MiB", [(row.samples[-1].peak or 0) / MIB for row in shown]),
    ]
    for axes, (title, values) in zip(panels, series, strict=True):
        axes.barh(names, values[::-1])
        axes.set_title(title)
    for index, row in enumerate(shown[::-1]):
        floor = 1e3 * row.decode_floor
        panels[1].plot([floor, floor], [index - 0.4, index + 0.4], color="black")
    figure.savefig(path)
