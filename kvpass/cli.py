"""The command line: `kvpass demo`, `bench`, `export`, `diff`, `inspect`, `presses`, `calibrate`, `quality`."""

import importlib.metadata
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from kvpass.bench.run import Settings, run_bench
from kvpass.bench.shapes import shape_names
from kvpass.calibrate.run import run_calibrate
from kvpass.demo.run import run_demo
from kvpass.deployment.export import FORMATS
from kvpass.deployment.run import ExportSettings, run_diff, run_export
from kvpass.errors import InputError, KVPassError
from kvpass.inspection.run import run_inspect
from kvpass.press import Press
from kvpass.press_facts import PressFacts, docstring, facts_of, fields_of
from kvpass.quality.run import run_quality
from kvpass.registry import parse_press, press_class, registered_presses

app = typer.Typer(
    name="kvpass",
    help="KV-cache compression as a compiler pass.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Backend(StrEnum):
    """What runs the graphs."""

    INDUCTOR = "inductor"
    EAGER = "eager"


class DType(StrEnum):
    """What `kvpass bench` computes in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


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
def bench(
    model: Annotated[str | None, typer.Option(help="A folder of transformers, a hub id, or smollm2.")] = None,
    shape: Annotated[str | None, typer.Option(help=f"Random weights instead: {', '.join(shape_names())}.")] = None,
    press: Annotated[list[str] | None, typer.Option(help="As often as wanted; see `kvpass presses`.")] = None,
    ratio: Annotated[float, typer.Option(help="Fraction of key/value pairs to remove.")] = 0.5,
    context: Annotated[int, typer.Option(min=64, help="Tokens of the prompt.")] = 2048,
    new_tokens: Annotated[int, typer.Option(min=4, help="Tokens to generate in each run.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each subject.")] = 3,
    dtype: Annotated[DType, typer.Option(help="Of weights and cache.")] = DType.FLOAT32,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    backend: Annotated[Backend, typer.Option(help="What runs the graphs.")] = Backend.INDUCTOR,
    mode: Annotated[str | None, typer.Option(help="Of torch.compile, e.g. reduce-overhead.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Subjects whose name begins so, a regular expression.")] = None,
    warm: Annotated[bool, typer.Option(help="Compile in a process of its own, and once more in another.")] = True,
    json: Annotated[Path | None, typer.Option(help="Write everything that was measured to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw a PNG; needs kvpass[plot].")] = None,
) -> None:
    """Measure transformers, kvpress (where it is installed) and kvpass side by side, in turns, with medians."""
    with _errors_in_one_line():
        if (model is None) == (shape is None):
            raise InputError("give either --model or --shape")
        settings = Settings(
            model,
            shape,
            tuple(press or ("expected_attention",)),
            ratio,
            context,
            new_tokens,
            repeats,
            dtype.value,
            device,
            backend.value,
            mode,
            tuple(only or ()),
        )
        run_bench(Console(), settings, warm=warm, json_to=json, plot_to=plot)


@app.command()
def export(
    model: Annotated[str, typer.Option(help="A folder of transformers, a hub id, or smollm2.")],
    out: Annotated[Path, typer.Option(help="The file (aot_inductor: .pt2) or folder to write.")],
    format: Annotated[str, typer.Option(help=f"{', '.join(FORMATS)}.")] = "exported_program",
    press: Annotated[str | None, typer.Option(help="See `kvpass presses`; none: nothing is dropped.")] = None,
    ratio: Annotated[float | None, typer.Option(help="Fraction of key/value pairs to remove.")] = None,
    target_size: Annotated[int | None, typer.Option(help="Instead of a ratio: pairs that a KV head keeps.")] = None,
    guard: Annotated[str, typer.Option(help="host, or in_graph: one program that decides itself.")] = "host",
    batch_size: Annotated[int, typer.Option(min=1, help="Rows, fixed.")] = 1,
    max_tokens: Annotated[int | None, typer.Option(min=2, help="The longest prompt.")] = None,
    capacity: Annotated[int | None, typer.Option(min=1, help="Slots per layer, for in_graph.")] = None,
    dtype: Annotated[DType, typer.Option(help="Of weights and cache.")] = DType.FLOAT32,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    for_tensorrt: Annotated[
        bool, typer.Option("--for-tensorrt", help="Of onnx: in forms that TensorRT parses.")
    ] = False,
    target: Annotated[list[str] | None, typer.Option(help="Of tensorrt: SM80, SM89, ...; all if not given.")] = None,
) -> None:
    """Write a compressed model that runs without kvpass: programs of torch.export, compiled ahead of time, engines."""
    with _errors_in_one_line():
        settings = ExportSettings(
            model,
            press,
            ratio,
            target_size,
            format,
            out,
            guard,
            batch_size,
            max_tokens,
            capacity,
            dtype.value,
            device,
            for_tensorrt,
            tuple(target or ()),
        )
        run_export(Console(), settings)


@app.command()
def diff(
    before: Annotated[Path, typer.Argument(help="A package of `kvpass export`, or a file of torch.export.save.")],
    after: Annotated[Path, typer.Argument(help="Another one.")],
    only: Annotated[str | None, typer.Option(help="One program, e.g. prefill.")] = None,
) -> None:
    """Show what two exported models differ in, line by line. Exits with 1 if they differ."""
    with _errors_in_one_line():
        changed = run_diff(before, after, only)
        typer.echo(changed, nl=False)
        if changed:
            raise typer.Exit(1)


@app.command()
def quality(
    tokens: Annotated[int, typer.Option(min=512, max=8000, help="Length of the context.")] = 2000,
    continuation: Annotated[int, typer.Option(min=2, max=1000, help="Tokens after it that are compared.")] = 128,
    ratio: Annotated[list[float] | None, typer.Option(help="Fractions to remove.")] = None,
    press: Annotated[list[str] | None, typer.Option(help="Presses to measure; all if not given.")] = None,
) -> None:
    """Mean KL divergence from the uncompressed model over a continuation of a real text, for each press.

    Needs no network. With all presses it takes half an hour on two cores.
    """
    with _errors_in_one_line():
        table = run_quality(Console(stderr=True), tokens, continuation, ratio or [0.25, 0.5, 0.75], press or ())
        typer.echo(table, nl=False)


@app.command()
def inspect(
    model: Annotated[str | None, typer.Argument(help="A folder of transformers, a hub id, or smollm2.")] = None,
    arch: Annotated[
        str | None, typer.Option(help="Instead of a model: a tiny random one of this architecture, e.g. qwen3.")
    ] = None,
) -> None:
    """Show the attentions found in a model: masks, heads, RoPE, and which presses can run; or why it is refused."""
    with _errors_in_one_line():
        run_inspect(Console(), model, arch)


@app.command()
def presses(
    name: Annotated[
        str | None, typer.Argument(help='Show the options of this press, e.g. snapkv or "chunkkv(snapkv)".')
    ] = None,
) -> None:
    """List the compression methods, what they need and what they change; with a name, also the options."""
    with _errors_in_one_line():
        console = Console()
        if name is not None:
            _print_press(console, parse_press(name) if "(" in name else press_class(name))
            return
        for press in registered_presses().values():
            facts = facts_of(press)
            console.print(Text(facts.name, "bold"), soft_wrap=True)
            _print_wrapped(console, facts.sentence, "  ")
            _print_facts(console, facts)
            console.print()


@app.command()
def calibrate(
    method: Annotated[str, typer.Option(help="qfilter or expected_attention_stats.")],
    model: Annotated[str, typer.Option(help="A folder of transformers, a hub id, or smollm2.")],
    text: Annotated[list[Path], typer.Option(help="A text file, UTF-8; may be given several times.")],
    out: Annotated[str, typer.Option(help="A .safetensors file, or a folder for one.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to read of each text, from its beginning.")] = 2048,
    n_sink: Annotated[
        int | None, typer.Option(min=0, help="First tokens of each text to leave out; by default as the press does.")
    ] = None,
) -> None:
    """Learn from texts what a press needs to know of a model, and write the file that the press loads."""
    with _errors_in_one_line():
        run_calibrate(Console(), method, model, text, out, max_tokens, n_sink)


def _print_press(console: Console, press: Press | type[Press]) -> None:
    cls = press if isinstance(press, type) else type(press)
    console.print(Text(f"{cls.name}: {cls.__module__}.{cls.__qualname__}", "bold"), soft_wrap=True)
    for paragraph in docstring(cls).split("\n\n"):
        _print_wrapped(console, " ".join(paragraph.split()), "")
        console.print()
    _print_facts(console, facts_of(press))
    console.print()
    if not (rows := fields_of(press)):
        console.print("It has no options.")
        return
    rows = [("option", "type", "default" if isinstance(press, type) else "value"), *rows]
    name_width, kind_width = (max(len(row[i]) for row in rows) + 2 for i in (0, 1))
    for row in rows:
        line = f"  {row[0]:<{name_width}}{row[1]:<{kind_width}}{row[2]}"
        console.print(Text(line, "bold" if row is rows[0] else ""), soft_wrap=True)


def _print_facts(console: Console, facts: PressFacts) -> None:
    if facts.papers:
        _print_wrapped(console, " ".join(facts.papers), "  paper    ")
    _print_wrapped(console, facts.needs_text, "  needs    ")
    _print_wrapped(console, facts.changes, "  changes  ")
    _print_wrapped(console, facts.phase, "  phase    ")


def _print_wrapped(console: Console, text: str, label: str) -> None:
    """Wrapped between words only: what is longer than a line, an address in a narrow window, stays whole."""
    width = max(console.width, 40)
    lines = textwrap.wrap(text, width - len(label), break_long_words=False, break_on_hyphens=False)
    for i, line in enumerate(lines):
        console.print(Text(f"{' ' * len(label) if i else label}{line}"), soft_wrap=True)
