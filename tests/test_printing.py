"""Canonical text is the same in every process, for every example length, for every instance."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from models import compiled_model
from tiny_models import tiny_model

import kvpass
from kvpass.capture import export

SCRIPT = """
import kvpass
from tiny_models import tiny_model
model = kvpass.compile(tiny_model("qwen3"), press="snapkv", ratio=0.5, backend="eager")
print(*(model.print_graph(phase) for phase in ("prefill", "extend", "decode")), sep="", end="")
"""


def texts(model: kvpass.CompiledModel) -> str:
    return "".join(model.print_graph(phase) for phase in ("prefill", "extend", "decode"))


def test_same_in_another_process() -> None:
    """Hash seeds differ between processes, and so do torch's own symbol names."""
    root = Path(__file__).parents[1]
    paths = os.pathsep.join([str(root), str(root / "tests")])
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONHASHSEED": "4711"}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT], env=environment, check=True, capture_output=True, text=True
    )
    assert run.stdout == texts(compiled_model("qwen3", "snapkv", ratio=0.5))


@pytest.mark.parametrize(("batch", "length"), [(3, 31), (5, 80)])
def test_same_for_every_example(monkeypatch: pytest.MonkeyPatch, batch: int, length: int) -> None:
    expected = texts(compiled_model("llama", "expected_attention", ratio=0.5))
    monkeypatch.setattr(export, "EXAMPLE_BATCH", batch)
    monkeypatch.setattr(export, "EXAMPLE_LENGTH", length)
    other = kvpass.compile(tiny_model("llama"), press="expected_attention", ratio=0.5, backend="eager")
    assert texts(other) == expected


def test_diff_arguments_are_checked() -> None:
    model = compiled_model("llama", "knorm", ratio=0.5)
    with pytest.raises(ValueError, match=r"no pass 'fold'.*splice-press"):
        model.graph_diff(only="fold")
    with pytest.raises(ValueError, match="no layer 9; the model has 2"):
        model.graph_diff(layer=9)
    with pytest.raises(ValueError, match=r"no phase 'evict'.*prefill"):
        model.graph_diff(phase="evict")


def test_report_lists_passes_and_what_is_kept() -> None:
    model = compiled_model("llama", "knorm", ratio=0.25)
    from models import token_ids

    model.prefill(token_ids(1, 80))
    report = model.report()
    assert list(report.kept) == [60, 60]
    assert [record.name for record in report.passes["prefill"]][-5:] == [
        "splice-press",
        "splice-evict",
        "write-cache-in-place",
        "narrow-to-last-token",
        "lower-attention",
    ]
    assert all(record.matches > 0 for record in report.passes["prefill"][:-1])  # llama's attention is plain
    assert "layer   1: keeps 60" in str(report)
    assert "ratio=0.25" in str(report)
