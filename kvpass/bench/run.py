"""`kvpass bench`: prepare, warm up, measure in turns, compare."""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import Progress

from kvpass.bench import show
from kvpass.bench.clock import Sample, run
from kvpass.bench.floor import Hardware, decode_floor, measure_hardware, middle, prefill_floor
from kvpass.bench.shapes import loaded_model, random_model
from kvpass.bench.subjects import subjects
from kvpass.errors import InputError
from kvpass.graph_store import ENVIRONMENT
from kvpass.registry import resolve_press


@dataclass(frozen=True)
class Settings:
    """What is measured; `model` (a folder, a hub id, smollm2) or `shape` (random weights)."""

    model: str | None
    shape: str | None
    presses: tuple[str, ...]
    ratio: float
    context: int
    new_tokens: int
    repeats: int
    dtype: str
    device: str
    backend: str
    mode: str | None
    only: tuple[str, ...] = ()


@dataclass
class Row:
    """One subject: medians of its samples, or why it failed."""

    name: str
    cold: float = 0.0  # seconds until the first run was done, less a run
    warm: float | None = None  # the same in another process, with what the first one left on disk
    samples: list[Sample] = field(default_factory=list)
    failure: str = ""
    decode_floor: float = 0.0
    prefill_floor: float = 0.0

    def of(self, name: str) -> float:
        """The median of a field of the samples."""
        return float(median(getattr(sample, name) for sample in self.samples))

    def as_json(self) -> dict[str, Any]:
        told = asdict(self)
        told["samples"] = [{k: v for k, v in sample.items() if k != "tokens"} for sample in told["samples"]]
        return told


def run_bench(console: Console, settings: Settings, *, warm: bool, json_to: Path | None, plot_to: Path | None) -> None:
    """Measure all subjects in turns and print a table; also to JSON and PNG where a path is given.

    Raises `KVPassError` for an unknown shape or press.
    """
    for press in settings.presses:
        resolve_press(press)
    if plot_to is not None:
        show.need_matplotlib()
    environment = dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="kvpass-bench-") as folder:
        try:
            hardware, rows = measure(console, settings, Path(folder), warm=warm)
        finally:
            os.environ.clear()
            os.environ.update(environment)
    show.print_table(console, settings, hardware, rows)
    if json_to is not None:
        found = {
            "settings": asdict(settings),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "hardware": asdict(hardware),
            "subjects": [row.as_json() for row in rows],
        }
        json_to.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if plot_to is not None:
        show.plot(settings, rows, plot_to)


def measure(console: Console, settings: Settings, folder: Path, *, warm: bool) -> tuple[Hardware, list[Row]]:
    """Every subject in turn, `repeats` times, so that what else the machine does meets all of them, and its rates.

    `folder` is empty, so that the first compilation is a cold one. Each subject gets a part of it, so that none finds
    what another one has compiled.
    """
    quiet: Any = transformers.utils.logging
    quiet.set_verbosity_error()
    dtype, device = getattr(torch, settings.dtype), torch.device(settings.device)
    with Progress(console=console) as progress:
        step = progress.add_task("the machine", total=None)
        rates = [measure_hardware(dtype, device)]
        progress.update(step, description="the model")
        model = _model(settings)
        vocabulary = model.config.get_text_config(decoder=True).vocab_size
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(10, vocabulary - 10, (1, settings.context), generator=generator).to(device)
        table = subjects(model, settings.presses, settings.ratio, settings.backend, settings.mode, settings.only)
        if not table:
            raise InputError(f"only {', '.join(settings.only)}: no subject is called so, e.g. 'kvpass'")
        progress.update(step, total=len(table) * (settings.repeats + 1), completed=0)
        rows, ready = [Row(name) for name in table], {}
        for row in rows:
            progress.update(step, description=f"warming up: {row.name}")
            _cache_in(folder / str(rows.index(row)))
            start = time.perf_counter()
            try:
                ready[row.name] = table[row.name]()
                run(ready[row.name], ids, settings.new_tokens)
                row.cold = time.perf_counter() - start
            except Exception as error:  # whatever others do is a result of theirs; ours must not fail
                if row.name.startswith("kvpass"):
                    raise
                row.failure = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            progress.advance(step)
        for _ in range(settings.repeats):
            for row in (row for row in rows if not row.failure):
                progress.update(step, description=row.name)
                row.samples.append(run(ready[row.name], ids, settings.new_tokens))
                progress.advance(step)
            rates.append(measure_hardware(dtype, device, repeats=3))
    hardware = middle(rates)
    for row in (row for row in rows if row.samples):
        row.cold -= row.of("prefill") + row.of("step") * (settings.new_tokens - 1)
        row.decode_floor = decode_floor(model, int(row.of("kept_bytes")), hardware)
        row.prefill_floor = prefill_floor(model, settings.context, hardware)
    if warm:
        for row in (row for row in rows if row.samples and row.name.startswith("kvpass")):
            # In this process the subjects before it left code in memory, which is in no folder of its own.
            _cache_in(folder / f"alone-{rows.index(row)}")
            one_run = row.of("prefill") + row.of("step") * (settings.new_tokens - 1)
            with console.status(f"in a process of its own: {row.name}"):
                row.cold = _in_another_process(settings, row.name) - one_run
            with console.status(f"in another one: {row.name}"):
                row.warm = _in_another_process(settings, row.name) - one_run
    return hardware, rows


def _cache_in(folder: Path) -> None:
    """Let inductor and kvpass keep there what they compile."""
    os.environ |= {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), ENVIRONMENT: str(folder / "graphs")}


def _model(settings: Settings) -> Any:
    dtype, device = getattr(torch, settings.dtype), torch.device(settings.device)
    if settings.model is not None:
        return loaded_model(settings.model, dtype, device)
    return random_model(settings.shape or "", dtype, device)


def _in_another_process(settings: Settings, name: str) -> float:
    """Seconds from making the subject to the end of its first run, model loading left out."""
    command = [sys.executable, "-m", "kvpass.bench.run", json.dumps({**asdict(settings), "only": [name]})]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def _once(text: str) -> float:
    settings = Settings(**json.loads(text))
    model = _model(settings)
    ids = torch.full((1, settings.context), 11, device=settings.device)
    table = subjects(model, settings.presses, settings.ratio, settings.backend, settings.mode, tuple(settings.only))
    start = time.perf_counter()
    run(table[settings.only[0]](), ids, settings.new_tokens)
    return time.perf_counter() - start


if __name__ == "__main__":
    print(_once(sys.argv[1]))
