"""`python -m tests.sweep`: writes table.md beside this file and prints the counts."""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .check import PRESSES, Outcome, Result
from .configs import architectures
from .running import run_all
from .table import counts, markdown


def main(arguments: list[str] | None = None) -> int:
    """0 if no architecture failed; refusing one is no failure."""
    options = _options(arguments)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    console = Console(stderr=True)
    rows, left_out = architectures()
    if unknown := sorted(set(options.only or ()) - set(rows)):
        reasons = [f"{name} ({left_out.get(name, 'unknown')})" for name in unknown]
        console.print(f"not in the sweep: {', '.join(reasons)}")
        return 2
    chosen = [row for name, row in rows.items() if not options.only or name in options.only]
    results = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("architectures", total=len(chosen))
        for result in run_all(chosen, options.presses, options.timeout, options.jobs):
            results.append(result)
            reason = next((v.reason for v in result.verdicts.values() if v.outcome is result.outcome), "")
            line = f"{result.name}: {result.outcome.value} {reason} ({result.seconds:.0f} s)"
            progress.console.print(line, markup=False, highlight=False)
            progress.advance(task)
            # After each one, so that a run that is stopped leaves what it found.
            options.out.write_text(markdown(results, left_out, options.presses))
            if options.details:
                options.details.write_text(_details(results))
    print(counts(results, left_out))
    return int(any(result.outcome is Outcome.FAILED for result in results))


def _details(results: Sequence[Result]) -> str:
    told = [
        f"=== {result.name} / {press}\n{verdict.detail}"
        for result in results
        for press, verdict in result.verdicts.items()
        if verdict.detail
    ]
    return "\n\n".join(told)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.sweep", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these architectures, by model type")
    parser.add_argument("--presses", nargs="+", choices=list(PRESSES), default=list(PRESSES))
    parser.add_argument("--timeout", type=float, default=240.0, help="seconds for one architecture")
    parser.add_argument("--jobs", type=int, default=2, help="architectures at the same time")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("table.md"))
    parser.add_argument("--details", type=Path, help="write whole messages and tracebacks to this file")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
