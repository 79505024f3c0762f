"""The other way to an engine: phases as ONNX in the forms that TensorRT takes, read by its own parser."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from deployment.tensorrt_cases import (
    ARCHITECTURES,
    LONGEST,
    MAX_TOKENS,
    TAKEN,
    Named,
    check_prompt,
    distinct_ids,
    model_with,
    needs_tensorrt,
    with_room,
)
from models import compiled_model

import kvpass
from kvpass.backends.onnx import OnnxRunner, write_phases
from kvpass.backends.onnx.names import STATE
from kvpass.backends.tensorrt.conversion import profile_of
from kvpass.backends.tensorrt.evaluation import evaluate
from kvpass.backends.tensorrt.library import library
from kvpass.deployment.export import prefill_program, prompts_of, step_program
from kvpass.deployment.manifest import PhaseSpec, phase_spec
from kvpass.errors import PackageError
from kvpass.ir.form import Phase

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package, reason="the extra kvpass[onnx] is not installed")

pytestmark = needs_tensorrt
LENGTHS = (53, 149)  # neither is an example's


@dataclass
class Parsed:
    """A phase as TensorRT's parser reads it, and as ONNX Runtime runs it."""

    spec: PhaseSpec
    folder: Path

    def run(self, inputs: Named) -> Named:
        """The outputs by name, new state as well, as ONNX Runtime computes them."""
        given = {port.name: inputs[port.name].clone() for port in self.spec.inputs}
        found = OnnxRunner(self.folder, [self.spec.name], threads=1).run(self.spec.name, given)
        return {port.name: found[port.name] if port.name in found else given[port.name] for port in self.spec.outputs}

    @functools.cached_property
    def _read(self) -> tuple[Any, Any, Any]:
        trt = library().trt
        builder = trt.Builder(trt.Logger(trt.Logger.INTERNAL_ERROR))
        network = builder.create_network()
        parser = trt.OnnxParser(network, trt.Logger(trt.Logger.INTERNAL_ERROR))
        taken = parser.parse_from_file(str(self.folder / f"{self.spec.name}.onnx"))
        assert taken, [parser.get_error(i).desc() for i in range(parser.num_errors)]
        return builder, network, parser

    def evaluate(self, inputs: Named) -> Named:
        """The same from the network that the parser made."""
        _, network, _ = self._read
        given = {port.name: inputs[port.name] for port in self.spec.inputs}
        names = [network.get_output(i).name.removesuffix(STATE) for i in range(network.num_outputs)]
        return dict(zip(names, evaluate(network, given), strict=True))

    def build(self, target: str) -> bytes | None:
        """What the builder makes of that network."""
        trt = library().trt
        builder, network, _ = self._read
        config, profile = builder.create_builder_config(), builder.create_optimization_profile()
        for name, extent in profile_of(self.spec, MAX_TOKENS).items():
            profile.set_shape(name, extent.least, extent.usual, extent.most)
        config.add_optimization_profile(profile)
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, target), 0)
        plan: bytes | None = builder.build_serialized_network(network, config)
        return plan


def parsed(phase: str, tokens: list[tuple[int, int]], program: Any, folder: Path) -> Parsed:
    write_phases({phase: program}, folder)
    return Parsed(phase_spec(phase, phase, tokens, program), folder)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("press", TAKEN)
def test_a_prompt(arch: str, press: str, tmp_path: Path) -> None:
    """ONNX Runtime and the parsed network keep what eager keeps, and the network is built."""
    model = model_with(press, arch)
    for number, prompts in enumerate(prompts_of(model._recipe.press, model._recipe.budget, 1, LONGEST)):
        program = prefill_program(model, "tensorrt", prompts, 1, LONGEST)
        phase = parsed("prefill", prompts.ranges, program, tmp_path / str(number))
        for tokens in (n for n in LENGTHS if phase.spec.takes(n)):
            found = check_prompt(model, [phase], tokens)
            for name, value in phase.evaluate({"input_ids": distinct_ids(tokens)}).items():
                torch.testing.assert_close(value, found[name], atol=2e-5, rtol=1e-4, msg=name)
        assert phase.build("SM89")


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
    assert step.build("SM89")


def test_a_package(tmp_path: Path) -> None:
    """The public way: a package in these forms, which ONNX Runtime continues as eager does."""
    model = model_with("knorm")
    model.export(tmp_path / "package", "onnx", max_tokens=LONGEST, for_tensorrt=True)
    loaded: Any = kvpass.load(tmp_path / "package")
    text = model.generate(distinct_ids(53), max_new_tokens=8, do_sample=False)
    assert torch.equal(loaded.generate(distinct_ids(53), 8), text)
    for spec in loaded.manifest.phases:
        assert Parsed(spec, tmp_path / "package").build("SM89")
    with pytest.raises(PackageError, match="for_tensorrt=True: for format='onnx' alone, not 'tensorrt'"):
        model.export(tmp_path / "other", "tensorrt", for_tensorrt=True)
