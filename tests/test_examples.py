"""The examples run as a user runs them, in a process of their own, with small sizes."""

import importlib.util
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from kvpass import smollm2

ROOT = Path(__file__).parent.parent


def _installed(distribution: str) -> bool:
    try:
        metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        return False
    return importlib.util.find_spec("gguf") is not None


@pytest.mark.skipif(not _installed(smollm2.DISTRIBUTION), reason=f"needs gguf, and {smollm2.INSTALL}")
def test_quickstart_continues_answers_and_reports() -> None:
    command = [sys.executable, "examples/quickstart.py", "--tokens", "192"]
    command += ["--backend", "eager", "--max-new-tokens", "8"]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert any(line.startswith("Continuation: ") for line in lines)
    answers = [line for line in lines if line.startswith("  with")]
    assert "Professor Whiskers" in answers[1], "the uncompressed model does not find the needle"
    assert "last prompt: 192 tokens" in run.stdout
    assert "layer  29: keeps 96" in run.stdout
