"""Phases as ONNX in the forms that TensorRT takes, run by ONNX Runtime and read by TensorRT's own parser."""

import functools
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from deployment.tensorrt_cases import MAX_TOKENS, Named

from kvpass.backends.onnx import OnnxRunner, write_phases
from kvpass.backends.onnx.names import STATE
from kvpass.backends.tensorrt.conversion import profile_of
from kvpass.backends.tensorrt.evaluation import evaluate
from kvpass.backends.tensorrt.library import library
from kvpass.deployment.manifest import PhaseSpec, phase_spec

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(package) is None for package in ("onnx", "onnxscript", "onnxruntime")),
    reason="the extra kvpass[onnx] is not installed",
)


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

    def build(self, targets: Sequence[str]) -> bytes | None:
        """What the builder makes of that network for these compute capabilities."""
        trt = library().trt
        builder, network, _ = self._read
        config, profile = builder.create_builder_config(), builder.create_optimization_profile()
        for name, extent in profile_of(self.spec, MAX_TOKENS).items():
            profile.set_shape(name, extent.least, extent.usual, extent.most)
        config.add_optimization_profile(profile)
        config.num_compute_capabilities = len(targets)
        for index, target in enumerate(targets):
            config.set_compute_capability(getattr(trt.ComputeCapability, target), index)
        plan: bytes | None = builder.build_serialized_network(network, config)
        return plan


def parsed(phase: str, tokens: list[tuple[int, int]], program: Any, folder: Path) -> Parsed:
    write_phases({phase: program}, folder, for_tensorrt=True)
    return Parsed(phase_spec(phase, phase, tokens, program), folder)
