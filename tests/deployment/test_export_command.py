"""`kvpass export` on a model in a folder."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from deployment.tensorrt_cases import needs_tensorrt
from models import eager_model, token_ids
from typer.testing import CliRunner

import kvpass
from kvpass.cli import app


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "llama"
    eager_model("llama").save_pretrained(path)
    return path


def run(model: Path | str, out: Path, *arguments: str) -> Result:
    given = ("--model", str(model), "--out", str(out), "--max-tokens", "64", *arguments)
    return CliRunner().invoke(app, ["export", *given], env={"COLUMNS": "140"})


def test_a_program(model: Path, tmp_path: Path) -> None:
    """It says what it does, and what was written continues a prompt."""
    done = run(model, tmp_path / "package", "--press", "knorm", "--ratio", "0.5")
    assert done.exit_code == 0, done.output
    for said in ("Capturing the model", "Exporting prefill", "Exporting decode", "package: "):
        assert said in done.output
    eager = kvpass.compile(eager_model("llama"), "knorm", 0.5, backend="eager")
    expected = eager.generate(token_ids(1, 50), max_new_tokens=5, do_sample=False)
    assert torch.equal(kvpass.load(tmp_path / "package").generate(token_ids(1, 50), 5), expected)


def test_onnx_for_tensorrt(model: Path, tmp_path: Path) -> None:
    """In the models selections are TopK layers of a constant size."""
    onnx = pytest.importorskip("onnx", reason="the extra kvpass[onnx] is not installed")
    pytest.importorskip("onnxscript", reason="the extra kvpass[onnx] is not installed")
    options = ("--press", "knorm", "--ratio", "0.5", "--format", "onnx", "--for-tensorrt")
    done = run(model, tmp_path / "package", *options)
    assert done.exit_code == 0, done.output
    graph: Any = onnx.load(tmp_path / "package" / "prefill.onnx", load_external_data=False).graph
    constants = {tensor.name for tensor in graph.initializer} | {
        n.output[0] for n in graph.node if n.op_type == "Constant"
    }
    selections = [node for node in graph.node if node.op_type == "TopK"]
    assert selections and all(node.input[1] in constants for node in selections)


@needs_tensorrt
def test_engines(model: Path, tmp_path: Path) -> None:
    done = run(model, tmp_path / "package", "--format", "tensorrt", "--target", "SM80", "--target", "SM89")
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "package" / "engines.json").read_text())["targets"] == ["SM80", "SM89"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--for-tensorrt",), "for_tensorrt=True: for format='onnx' alone"),
        (("--target", "SM89"), "targets: for format='tensorrt' alone"),
        (("--format", "torchscript"), "there is no format 'torchscript'"),
    ],
)
def test_what_does_not_go_together(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    """Said before a model is looked for."""
    done = run("nowhere", tmp_path / "package", *arguments)
    assert done.exit_code == 1 and message in done.output
    assert not list(tmp_path.iterdir())
