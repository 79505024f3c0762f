"""The courses of `kvpass export` and `kvpass diff`."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

import kvpass
from kvpass.bench.shapes import loaded_model
from kvpass.demo.show import step
from kvpass.deployment.diff import diff_text
from kvpass.deployment.export import checked_options, read_texts
from kvpass.errors import InputError
from kvpass.package_files import bytes_of


@dataclass(frozen=True)
class ExportSettings:
    """The options of `kvpass export`."""

    model: str
    press: str | None
    ratio: float | None
    target_size: int | None
    format: str
    out: Path
    guard: str = "host"
    batch_size: int = 1
    max_tokens: int | None = None
    capacity: int | None = None
    dtype: str = "float32"
    device: str = "cpu"
    for_tensorrt: bool = False
    targets: tuple[str, ...] = ()


def run_export(console: Console, settings: ExportSettings) -> None:
    """Load, capture, export; says what it does meanwhile and how large the result is.

    Raises `KVPassError` for what is wrong with the arguments, before anything slow where possible.
    """
    engine: dict[str, Any] = {"targets": settings.targets} if settings.targets else {}
    checked_options(
        settings.out,
        settings.format,
        settings.guard,
        settings.batch_size,
        settings.capacity,
        for_tensorrt=settings.for_tensorrt,
        engine=engine,
    )
    with step(console, f"Loading {settings.model}"):
        model = loaded_model(settings.model, getattr(torch, settings.dtype), torch.device(settings.device))
    with step(console, "Capturing the model"):
        compiled = kvpass.compile(model, settings.press, settings.ratio, target_size=settings.target_size)
    with _steps(console) as progress:
        compiled.export(
            settings.out,
            settings.format,
            guard=settings.guard,
            batch_size=settings.batch_size,
            max_tokens=settings.max_tokens,
            capacity=settings.capacity,
            progress=progress,
            for_tensorrt=settings.for_tensorrt,
            **engine,
        )
    console.print(Text(f"{settings.out}: {bytes_of(settings.out) / 2**20:,.1f} MiB"), soft_wrap=True)


def run_diff(before: Path, after: Path, only: str | None) -> str:
    """What two packages differ in, as text; empty if they are the same.

    only: the name of one program. Raises `PackageError` for what is no package, `InputError` for an unknown name.
    """
    old, new = read_texts(before), read_texts(after)
    if only is not None:
        if only not in {*old, *new}:
            raise InputError(f"there is no program {only!r}; known are {', '.join(dict.fromkeys([*old, *new]))}")
        old, new = ({name: text for name, text in texts.items() if name == only} for texts in (old, new))
    return diff_text(old, new)


@contextmanager
def _steps(console: Console) -> Iterator[Callable[[str], None]]:
    """A function that ends one step and begins the next."""
    with ExitStack() as last:

        def begin(label: str) -> None:
            last.close()
            last.enter_context(step(console, label.capitalize()))

        yield begin
