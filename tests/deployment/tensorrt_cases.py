"""Phases of tiny models as TensorRT networks, evaluated on the CPU beside eager's numbers."""

from dataclasses import dataclass, field
from typing import Any

import torch
from models import compiled_model
from torch import Tensor
from torch.export import ExportedProgram

import kvpass
from kvpass.backends.tensorrt.conversion import Network, convert, lower, profile_of, unsupported
from kvpass.backends.tensorrt.evaluation import evaluate
from kvpass.deployment.export import _programs
from kvpass.deployment.manifest import PhaseSpec

LONGEST = 200
Named = dict[str, Tensor]


@dataclass
class Converted:
    """A compiled model and the networks of its phases, each converted when it is first asked for."""

    model: kvpass.CompiledModel
    programs: dict[str, ExportedProgram]
    phases: dict[str, PhaseSpec]
    networks: dict[str, Network] = field(default_factory=dict)

    def network(self, name: str) -> Network:
        if name not in self.networks:
            lowered = lower(self.programs[name])
            assert [f"{node.name} {node.target}" for node in unsupported(lowered)] == []
            self.networks[name] = convert(lowered, profile_of(self.phases[name], 300))
        return self.networks[name]

    def run(self, name: str, inputs: Named) -> Named:
        """The outputs of a phase by name, as the network computes them."""
        spec = self.phases[name]
        found = evaluate(self.network(name).definition, {port.name: inputs[port.name] for port in spec.inputs})
        return dict(zip((port.name for port in spec.outputs), found, strict=True))

    def prefill(self, ids: Tensor) -> str:
        """The phase that reads this prompt."""
        return next(n for n, spec in self.phases.items() if spec.phase == "prefill" and spec.takes(ids.shape[1]))


def converted(arch: str, press: Any, longest: int = LONGEST, **options: Any) -> Converted:
    """The phases of a tiny model, for one row."""
    model = compiled_model(arch, press, **options)
    programs, phases = _programs(model, "tensorrt", 1, longest, lambda step: None)
    return Converted(model, programs, {spec.name: spec for spec in phases})


def distinct_ids(tokens: int, seed: int = 0) -> Tensor:
    """Tokens that occur once: equal keys have scores that only rounding tells apart. i64[1, tokens]"""
    return torch.randperm(256, generator=torch.Generator().manual_seed(seed))[None, :tokens]


def with_room(state: Named, phase: PhaseSpec, room: int, rings: dict[int, int]) -> Named:
    """The state that a prefill returned, its caches with free slots, as an extend or decode phase takes it."""
    found = {}
    for port in phase.inputs:
        if port.name == "input_ids":
            continue
        old = state[port.name]
        if port.layer is not None:
            slots = rings.get(port.layer) or old.shape[2] + room
            new = old.new_zeros(*old.shape[:2], slots, *old.shape[3:])
            new[:, :, : old.shape[2]] = old[:, :, :slots]
            old = new
        found[port.name] = old
    return found
