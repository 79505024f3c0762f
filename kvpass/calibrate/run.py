"""The course of `kvpass calibrate`: load, capture, read, write."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from kvpass import capture_model
from kvpass.calibrate.files import load_model, prepared, read_samples, save
from kvpass.calibrate.methods import calibrate, method_of
from kvpass.demo.show import step
from kvpass.errors import InputError
from kvpass.registry import press_class

OPTIONS = {"qfilter": "filters", "expected_attention_stats": "stats_folder"}  # the field that names the file


def run_calibrate(
    console: Console,
    method: str,
    model: str,
    texts: Sequence[Path],
    out: str,
    max_tokens: int,
    n_sink: int | None = None,
) -> Path:
    """Write what `method` needs to know of `model` to `out`; returns the file.

    texts: one sample each, their first `max_tokens` tokens or as many as the model takes. Raises `KVPassError` for
    what is wrong with the arguments, before anything slow where possible.
    """
    chosen = method_of(method)
    target = prepared(out)
    if not texts:
        raise InputError("calibrate: no text; give --text FILE")
    with step(console, f"Loading {model}"):
        loaded, tokenizer = load_model(model)
    samples = read_samples(texts, tokenizer, max_tokens)
    with step(console, "Capturing the model"):
        captured = capture_model(loaded)
    samples = [ids[: captured.max_tokens] for ids in samples]
    tokens = sum(len(ids) for ids in samples)
    read = f"{tokens:,} tokens of {len(samples)} text{'s' if len(samples) > 1 else ''}"
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Without a terminal a bar would be printed once, at its end.
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"Reading {read}, layer by layer", total=None)
        learned = calibrate(
            captured,
            method,
            samples,
            n_sink=n_sink,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    skipped = chosen.n_sink if n_sink is None else n_sink
    about = {"method": method, "model": model, "tokens": str(tokens)}
    save(learned, target, {**about, "samples": str(len(samples)), "n_sink": str(skipped)})
    shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in learned.items())
    console.print(Text(f"Read {read}: {shapes}"), soft_wrap=True)
    press = press_class(method)
    console.print(Text(f"Written: {target}"), soft_wrap=True)
    options = f'{OPTIONS[method]}="{target}"'
    if n_sink is not None and "n_sink" in press.__dataclass_fields__:
        options += f", n_sink={n_sink}"
    console.print(Text(f"Use: kvpass.presses.{press.__name__}({options})"), soft_wrap=True)
    return target
