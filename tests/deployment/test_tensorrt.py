"""What TensorRT is given, on a machine without a GPU: it takes every node, computes eager's numbers, and is built."""

import json
from pathlib import Path

import pytest
import torch
from deployment.tensorrt_cases import (
    ARCHITECTURES,
    TARGETS,
    check_prompt,
    check_steps,
    distinct_ids,
    model_with,
    needs_tensorrt,
    prefills,
    step,
)
from models import captured_model, compiled_model
from tiny_models import tiny_model

import kvpass
from kvpass.backends.tensorrt.conversion import lower
from kvpass.backends.tensorrt.library import library
from kvpass.deployment.export import step_program
from kvpass.errors import PackageError
from kvpass.ir.form import Phase
from kvpass.pass_manager import PassManager
from kvpass.passes.lower_for_tensorrt import LowerForTensorRT
from kvpass.pipeline import phase_passes

pytestmark = needs_tensorrt

LENGTHS = (53, 149)  # neither is an example's


@pytest.mark.parametrize(("arch", "press"), [("llama", "knorm"), ("qwen3", "snapkv(window_size=8)")])
def test_texts(arch: str, press: str) -> None:
    """What follows a prompt reads and writes the caches that it left."""
    model = compiled_model(arch, press, ratio=0.5)
    phases = prefills(model)
    for tokens in LENGTHS:
        check_steps(captured_model(arch), model, tokens, check_prompt(model, phases, tokens))


def test_windows() -> None:
    """Layers of a window hold rings."""
    model = compiled_model("gemma3_text", "snapkv(window_size=8)", ratio=0.5)
    phases = prefills(model)
    for tokens in LENGTHS:
        check_steps(captured_model("gemma3_text"), model, tokens, check_prompt(model, phases, tokens))


def test_without_a_press() -> None:
    model = compiled_model("llama")
    check_steps(captured_model("llama"), model, 53, check_prompt(model, prefills(model), 53))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_steps_are_built(arch: str, dtype: torch.dtype) -> None:
    """What reads on behind a prompt is the same for all presses; Gemma 3 has a ring and a full layer."""
    small = {"num_hidden_layers": 2 if arch == "gemma3_text" else 1}
    model = kvpass.compile(tiny_model(arch, dtype=dtype, **small), backend="eager")
    for phase in (Phase.EXTEND, Phase.DECODE):
        network = step(model, phase).network
        names = [network.definition.get_output(i).name for i in range(network.definition.num_outputs)]
        assert names[0] == "logits" and len({*names, *network.profile}) == len(names) + len(network.profile)
        assert network.build(TARGETS)


def test_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written, and that it says why it cannot run here."""
    tiny = tiny_model("llama", num_hidden_layers=1)
    model = kvpass.compile(tiny, "knorm", ratio=0.5, backend="eager")
    sizes = {"prefill": (2, 32, 64), "extend": (2, 8, 16), "slots": (2, 64, 128)}
    model.export(tmp_path / "engines", "tensorrt", max_tokens=64, profile=sizes, targets=["SM89"])
    assert sorted(path.name for path in (tmp_path / "engines").glob("*.engine")) == [
        f"{phase}.engine" for phase in ("decode", "extend", "prefill")
    ]
    told = json.loads((tmp_path / "engines" / "engines.json").read_text())
    assert told["profiles"]["extend"]["input_ids"] == [[1, 2], [1, 8], [1, 16]]
    assert told["profiles"]["decode"]["keys_0"] == [[1, 2, 2, 16], [1, 2, 64, 16], [1, 2, 128, 16]]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(PackageError, match="exported for cuda, which is not here"):
        kvpass.load(tmp_path / "engines")
    with pytest.raises(PackageError, match="targets: for format='tensorrt' alone"):
        model.export(tmp_path / "other", targets=["SM89"])


def test_report() -> None:
    """Before anything is built: what converts each operator, and why a press is refused."""
    fine = model_with("knorm").report("tensorrt")
    assert not fine.fallbacks and not fine.refused
    cumulative = [row for row in fine.operators if row.name == "aten.cumsum.default"]
    assert [(row.phase, row.converter) for row in cumulative] == [("prefill", "kvpass.backends.tensorrt.converters")]
    assert "prefill: " in str(fine) and " 0 would fall back" in str(fine)
    refused = model_with("leverage").report("tensorrt").refused
    assert "TensorRT has no Cholesky factor" in refused[0]


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what to install; torch.compile's backend is refused."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PackageError, match=r"pip install 'kvpass\[tensorrt\]'"):
        library.__wrapped__()
    with pytest.raises(PackageError, match="loses every write"):
        kvpass.compile(captured_model("llama"), backend="torch_tensorrt").prefill(distinct_ids(5))


def test_a_program_that_writes_is_refused() -> None:
    """By the pass, and by whoever lowers another program."""
    model = compiled_model("llama")
    with pytest.raises(kvpass.errors.VerificationError, match="writes to keys_0, which TensorRT would drop"):
        PassManager((*phase_passes(Phase.DECODE, None), LowerForTensorRT(200))).run(model._located)
    with pytest.raises(PackageError, match="writes to lengths"):
        lower(step_program(model, "aot_inductor", Phase.EXTEND, 1, 200))
