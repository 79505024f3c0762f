"""The command line: `kvpass demo`, `kvpass presses`."""

import dataclasses
import importlib.metadata
import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvpass.demo.run import run_demo
from kvpass.errors import KVPassError
from kvpass.press import Press, registered_presses, resolve_press

app = typer.Typer(
    name="kvpass",
    help="KV-cache compression as a compiler pass.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Backend(StrEnum):
    """What runs the graphs of the demo."""

    INDUCTOR = "inductor"
    EAGER = "eager"


@contextmanager
def _errors_in_one_line() -> Iterator[None]:
    """An error of kvpass names the cure, which a traceback would hide; other errors are bugs and keep it."""
    try:
        yield
    except KVPassError as error:
        message = f"Error: {' '.join(str(error).split())}"
        Console(stderr=True).print(Text(message, "red"), soft_wrap=True)
        raise typer.Exit(1) from None


def _print_version(wanted: bool) -> None:
    if wanted:
        try:
            version = importlib.metadata.version("kvpass")
        except importlib.metadata.PackageNotFoundError:  # run from a checkout
            version = "unknown (not installed)"
        typer.echo(f"kvpass {version}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """KV-cache compression as a compiler pass."""


@app.command()
def demo(
    tokens: Annotated[int, typer.Option(min=128, max=8000, help="Length of the context.")] = 2048,
    press: Annotated[str, typer.Option(help="See `kvpass presses`.")] = "expected_attention",
    ratio: Annotated[float, typer.Option(help="Fraction of key/value pairs to remove.")] = 0.5,
    backend: Annotated[Backend, typer.Option(help="What runs the graphs.")] = Backend.INDUCTOR,
    max_new_tokens: Annotated[int, typer.Option(min=2, max=150, help="Length of the continuation.")] = 48,
) -> None:
    """Let a real 135M model read a long text, with and without compression. Needs no network.

    With inductor it takes some minutes: three graphs are compiled.
    """
    with _errors_in_one_line():
        run_demo(Console(), tokens, press, ratio, backend.value, max_new_tokens)


@app.command()
def presses(
    name: Annotated[str | None, typer.Argument(help="Show the options of this press.")] = None,
) -> None:
    """List the compression methods; with a name, the fields of that one and their defaults."""
    with _errors_in_one_line():
        if name is None:
            _print_presses(Console())
        else:
            resolve_press(name)  # an unknown name is an error that offers the nearest
            _print_press(Console(), registered_presses()[name])


def _print_presses(console: Console) -> None:
    table = Table("press", "what it keeps")
    for name, press in registered_presses().items():
        table.add_row(Text(name), Text(_first_sentence(press)))
    console.print(table)


def _print_press(console: Console, press: type[Press]) -> None:
    console.print(Text(f"{press.name}: {press.__module__}.{press.__qualname__}", "bold"))
    for paragraph in _docstring(press).split("\n\n"):
        console.print(Text(" ".join(paragraph.split())), "\n")
    if fields := dataclasses.fields(press):
        table = Table("field", "type", "default")
        for field in fields:
            kind = getattr(field.type, "__name__", str(field.type))  # str(): unions, annotations kept as text
            table.add_row(Text(field.name), Text(kind), Text(_default(field)))
        console.print(table)
    else:
        console.print("It has no options.")


def _default(field: "dataclasses.Field[object]") -> str:
    if field.default is not dataclasses.MISSING:
        return repr(field.default)
    return "required" if field.default_factory is dataclasses.MISSING else repr(field.default_factory())


def _docstring(press: type[Press]) -> str:
    # A dataclass without a docstring is given its signature as one.
    text = press.__doc__ or ""
    return "" if text.startswith(f"{press.__name__}(") else inspect.cleandoc(text)


def _first_sentence(press: type[Press]) -> str:
    return re.split(r"(?<=\.)\s", " ".join(_docstring(press).split()), maxsplit=1)[0]
