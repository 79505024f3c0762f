"""The course of `kvpass demo`: load, compile, read, ask, compare."""

from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import transformers
from rich.console import Console

import kvpass
from kvpass import smollm2
from kvpass.budget import Budget
from kvpass.demo import show
from kvpass.demo.context import Context, make_context
from kvpass.demo.measure import Measured, measure, warm_up
from kvpass.registry import resolve_press


def run_demo(
    console: Console, tokens: int, press: str, ratio: float, backend: str, new_tokens: int
) -> dict[str, Measured]:
    """Compare SmolLM2-135M-Instruct on `tokens` of text as it is and compiled; returns what was measured.

    Raises `KVPassError` if the press or ratio is wrong, which is seen first, or the model is not installed.
    """
    resolve_press(press)
    Budget(ratio)
    # The demo owns its output: transformers' bars and hints on stderr would tear the spinner line.
    output: Any = transformers.utils.logging
    output.disable_progress_bar()
    output.set_verbosity_error()
    with show.step(console, "Loading SmolLM2-135M-Instruct (the first time converts it)"):
        model, tokenizer = smollm2.load()
    context = make_context(tokenizer, tokens)
    _introduce(console, context)
    with show.step(console, f"Capturing the model, splicing in {press}"):
        compiled = kvpass.compile(model, press=press, ratio=ratio, backend=backend)
    verb = "Running" if backend == "eager" else "Compiling"
    warm_up(compiled, context, tokenizer, partial(_phase_step, console, f"{verb} the % graph ({backend})"))
    warm_up(model, context, tokenizer, partial(_phase_step, console, "Warming up transformers (%)"))
    columns = {}
    for name, subject in (("uncompressed", model), ("compressed", compiled)):
        with show.step(console, f"Reading, continuing and answering, {name}"):
            columns[name] = measure(subject, context, tokenizer, new_tokens)
    console.print()
    show.print_continuations(console, columns)
    show.print_questions(console, context.needles, columns)
    show.print_numbers(console, context.ids.shape[1], context.needles, columns)
    console.print(
        "uncompressed: transformers, eager, with its DynamicCache.\n"
        f"compressed: kvpass, {press}, ratio {ratio:g}, {backend}.\n"
        "One run each after a warm-up. The difference in time is that of compiling and of compressing "
        "together, and of whatever else the machine does.",
        style="dim",
        highlight=False,
    )
    return columns


def _phase_step(console: Console, label: str, phase: str) -> AbstractContextManager[None]:
    return show.step(console, label.replace("%", phase))


def _introduce(console: Console, context: Context) -> None:
    console.print(
        f"\nThe context: {context.ids.shape[1]:,} tokens of the Python language reference. These sentences "
        "were added to it at equal distances, to ask about them:",
        highlight=False,
    )
    for needle in context.needles:
        console.print(f"  {needle.sentence}", markup=False, highlight=False)
    console.print("It is compressed before any question is known; all questions share one cache.\n")
