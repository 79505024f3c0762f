"""The other way to an engine: phases as ONNX in the forms that TensorRT takes, read by its own parser."""

from pathlib import Path
from typing import Any

import pytest
import torch
from deployment.onnx_cases import Parsed, needs_onnx, parsed
from deployment.tensorrt_cases import (
    ARCHITECTURES,
    LONGEST,
    TARGETS,
    distinct_ids,
    model_with,
    needs_tensorrt,
    with_room,
)
from models import compiled_model
from tiny_models import tiny_model

import kvpass
from kvpass.deployment.export import prefill_program, prompts_of, step_program
from kvpass.deployment.manifest import MANIFEST, Manifest
from kvpass.errors import PackageError
from kvpass.ir.form import Phase

pytestmark = [needs_tensorrt, needs_onnx]
LENGTHS = (53, 149)  # neither is an example's


@pytest.mark.parametrize("phase", [Phase.EXTEND, Phase.DECODE])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_new_tokens(arch: str, phase: Phase, tmp_path: Path) -> None:
    """They are read the same way for all presses: behind what one of them left, in caches with room and rings."""
    model = compiled_model(arch, "knorm", ratio=0.5)
    layers = model._execution.layout.layers
    (prompts,) = prompts_of(model._recipe.press, model._recipe.budget, len(layers), LONGEST)
    prefill = prefill_program(model, "tensorrt", prompts, 1, LONGEST).module()
    new = torch.tensor([[7]] if phase is Phase.DECODE else [[7, 8, 9, 10, 11]])
    counts = (1, 1) if phase is Phase.DECODE else (2, LONGEST)
    step = parsed(phase.value, [counts], step_program(model, "tensorrt", phase, 1, LONGEST), tmp_path / "step")
    for tokens in LENGTHS:
        inputs = {"input_ids": new, **with_room(model, prefill(distinct_ids(tokens)), step, 40)}
        cache = model.prefill(distinct_ids(tokens)).past_key_values
        expected = model(input_ids=new, past_key_values=cache).logits
        for found in (step.run(inputs), step.evaluate(inputs)):
            torch.testing.assert_close(found["logits"], expected, atol=2e-5, rtol=1e-4)
            assert torch.equal(found["lengths"], cache.lengths)
            for layer in (n for n, shape in enumerate(layers) if shape.ring is None):
                mine = found[f"keys_{layer}"][:, :, : cache.kept(layer)]
                torch.testing.assert_close(mine, cache.keys(layer), atol=2e-5, rtol=1e-4)
    assert step.build(TARGETS)


@pytest.mark.parametrize("phase", [Phase.EXTEND, Phase.DECODE])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_new_tokens_in_half_precision(arch: str, dtype: torch.dtype, phase: Phase, tmp_path: Path) -> None:
    """What is parsed is built; numbers are those of float32."""
    model = kvpass.compile(tiny_model(arch, dtype=dtype), backend="eager")
    counts = (1, 1) if phase is Phase.DECODE else (2, LONGEST)
    step = parsed(phase.value, [counts], step_program(model, "tensorrt", phase, 1, LONGEST), tmp_path)
    assert step.build(TARGETS)


def test_a_package(tmp_path: Path) -> None:
    """The public way: a package in these forms, which ONNX Runtime continues as eager does."""
    model = model_with("knorm")
    model.export(tmp_path / "package", "onnx", max_tokens=LONGEST, for_tensorrt=True)
    loaded: Any = kvpass.load(tmp_path / "package")
    text = model.generate(distinct_ids(53), max_new_tokens=8, do_sample=False)
    assert torch.equal(loaded.generate(distinct_ids(53), 8), text)
    for spec in loaded.manifest.phases:
        assert Parsed(spec, tmp_path / "package").build(["SM89"])
    with pytest.raises(PackageError, match="for_tensorrt=True: for format='onnx' alone, not 'tensorrt'"):
        model.export(tmp_path / "other", "tensorrt", for_tensorrt=True)


def test_a_bfloat16_package(tmp_path: Path) -> None:
    """TensorRT's parser reads it, ONNX Runtime cannot."""
    model = kvpass.compile(
        tiny_model("llama", dtype=torch.bfloat16, num_hidden_layers=1), "knorm", 0.5, backend="eager"
    )
    model.export(tmp_path / "package", "onnx", max_tokens=LONGEST, for_tensorrt=True)
    told = Manifest.from_json((tmp_path / "package" / MANIFEST).read_text(), "")
    for spec in told.phases:
        assert Parsed(spec, tmp_path / "package").build(["SM89"])
    with pytest.raises(PackageError, match="is bfloat16, for which ONNX Runtime has no CPU kernels; TensorRT's"):
        kvpass.load(tmp_path / "package")
