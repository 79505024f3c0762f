"""The course of `kvpass inspect`."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn
from transformers.utils import logging as transformers_logging

from kvpass import capture_model
from kvpass.calibrate.files import load_model
from kvpass.demo.show import step
from kvpass.errors import InputError
from kvpass.inspection.architectures import architectures
from kvpass.inspection.findings import Findings, LayerFindings, findings_of


def run_inspect(console: Console, model: str | None, arch: str | None) -> Findings:
    """Print what is located in a checkpoint, or in a tiny random model of an architecture.

    Raises `UnsupportedModelError` for a model that cannot be compiled: why, where, and the nearest cure.
    """
    if (model is None) == (arch is None):
        raise InputError("inspect: give a model (a path, a hub id, smollm2) or --arch NAME")
    with step(console, f"Loading {model or arch}"):
        loaded = load_model(model)[0] if model is not None else tiny_model_of(str(arch))
    with step(console, "Capturing the model"):
        captured = capture_model(loaded)
    found = findings_of(captured.graphs.located)
    table = Table("layers", "mask", "heads", "RoPE", "also", "lacks", title=type(loaded).__name__, title_justify="left")
    for same in _alike(found.layers):
        first = same[0]
        table.add_row(
            _span(same), first.mask, first.heads, first.rope, ", ".join(first.extras), ", ".join(first.missing)
        )
    console.print(table)
    console.print(Text(f"modules: {found.layers[0].path} to {found.layers[-1].path}"), soft_wrap=True)
    runs = [name for name, why in found.presses.items() if why is None]
    console.print(Text(f"presses that can run: {', '.join(runs) or 'none'}"), soft_wrap=True)
    for name, why in found.presses.items():
        if why is not None:
            console.print(Text(f"  not {name}: {why}"), soft_wrap=True)
    for note in found.notes:
        console.print(Text(f"note: {note}"), soft_wrap=True)
    return found


def tiny_model_of(arch: str) -> nn.Module:
    """A random model of an architecture, a few layers of width 64. Raises `InputError` for an unknown name."""
    with _quiet():  # configs of other architectures, with numbers that do not suit one another
        known, left_out = architectures()
    if arch not in known:
        why = f": {left_out[arch]}" if arch in left_out else f"; known are {', '.join(known)}"
        raise InputError(f"there is no decoder architecture {arch!r}{why}")
    with torch.random.fork_rng(devices=[]), _quiet():
        torch.manual_seed(0)
        return known[arch].model_class(known[arch].config()).float().eval()  # type: ignore[no-any-return]


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings of transformers."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def _alike(layers: tuple[LayerFindings, ...]) -> list[list[LayerFindings]]:
    """Layers of one kind together, in the order of the first of each."""
    kinds = list(dict.fromkeys(layer.kind for layer in layers))
    return [[layer for layer in layers if layer.kind == kind] for kind in kinds]


def _span(layers: list[LayerFindings]) -> str:
    """The numbers of layers, runs written as 3-7."""
    numbers = [layer.layer for layer in layers]
    runs = itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    parts = [[number for _, number in run] for _, run in runs]
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
