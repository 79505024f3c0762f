"""Each architecture in a process of its own, so that a hang or a crash costs only that one."""

import multiprocessing
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from .check import Outcome, Result, Verdict, check, failure
from .configs import Architecture


@dataclass
class _Running:
    architecture: Architecture
    process: BaseProcess
    started: float

    def seconds(self) -> float:
        return time.monotonic() - self.started


def run_all(rows: Sequence[Architecture], presses: Sequence[str], timeout: float, jobs: int) -> Iterator[Result]:
    """Results as they come, `jobs` at a time; an architecture that takes longer than `timeout` has failed."""
    # Forked, because importing torch and transformers takes longer than most architectures do.
    context = multiprocessing.get_context("fork")
    waiting, running = list(reversed(rows)), dict[Connection, _Running]()
    while waiting or running:
        while waiting and len(running) < jobs:
            row = waiting.pop()
            receiving, sending = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(row, presses, sending), daemon=True)
            process.start()
            sending.close()
            running[receiving] = _Running(row, process, time.monotonic())
        for pipe in wait(list(running), timeout=1.0):
            assert isinstance(pipe, Connection)
            yield _received(pipe, running.pop(pipe), presses)
        for pipe, late in list(running.items()):
            if late.seconds() > timeout:
                late.process.kill()
                late.process.join()
                del running[pipe]
                yield _stopped(late, presses, f"took longer than {timeout:.0f} s")


def _work(row: Architecture, presses: Sequence[str], sending: Connection) -> None:
    try:
        result = check(row, presses)
    except Exception as error:  # of the harness: the model could not be built, or the oracle not be trusted
        result = Result(row.name, row.model_class.__name__)
        result.verdicts = dict.fromkeys(presses, failure(error, "harness: "))
    sending.send(result)
    sending.close()


def _received(pipe: Connection, done: _Running, presses: Sequence[str]) -> Result:
    try:
        result: Result = pipe.recv()
    except EOFError:
        done.process.join()
        return _stopped(done, presses, f"the process ended with exit code {done.process.exitcode}")
    done.process.join()
    result.seconds = done.seconds()
    return result


def _stopped(late: _Running, presses: Sequence[str], reason: str) -> Result:
    result = Result(late.architecture.name, late.architecture.model_class.__name__, seconds=late.seconds())
    result.verdicts = dict.fromkeys(presses, Verdict(Outcome.FAILED, reason))
    return result
