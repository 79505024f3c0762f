"""Phases of tiny models as TensorRT networks, evaluated on the CPU beside eager's numbers."""

import copy
import functools
import importlib.util
import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from presses.catalogue import press_by_name
from tiny_models import tiny_model
from torch import Tensor
from torch.export import ExportedProgram

import kvpass
from kvpass.backends.tensorrt.conversion import Network, profile_of
from kvpass.backends.tensorrt.engines import network_of
from kvpass.backends.tensorrt.evaluation import evaluate
from kvpass.deployment.export import prefill_program, step_program
from kvpass.deployment.manifest import PhaseSpec, phase_spec
from kvpass.ir.form import Phase
from kvpass.prompts import Prompts, prompts_of

LONGEST = 200  # prompt; the examples that are traced have at most 130 tokens
MAX_TOKENS = 300
ARCHITECTURES = ("llama", "qwen3", "gemma3_text")  # plain, normalised queries and keys, other scales and windows
TARGETS = ("SM80", "SM89", "SM120")
REFUSED = {"block", "cap", "compactor", "finch", "leverage", "merging", "observed_attention"}
OURS = [name for name, cls in kvpass.registered_presses().items() if cls.__module__.startswith("kvpass.")]
TAKEN = sorted(set(OURS) - REFUSED)
Named = dict[str, Tensor]


def every_press_in(*dtypes: torch.dtype) -> pytest.MarkDecorator:
    """Each press that is taken on each architecture; tests of one case follow each other, for they share a program."""
    return pytest.mark.parametrize(
        ("name", "arch", "dtype"), list(itertools.product(TAKEN, ARCHITECTURES, dtypes)), scope="module"
    )


needs_tensorrt = pytest.mark.skipif(
    importlib.util.find_spec("torch_tensorrt") is None,
    reason="needs torch-tensorrt-rtx: pip install --no-deps torch-tensorrt-rtx, see the README",
)


@functools.cache
def one_layer(arch: str, dtype: torch.dtype = torch.float32) -> kvpass.CapturedModel:
    """Enough for a press: it says the same of every layer. That of Gemma 3 attends in full; rings are not pressed."""
    full = {"layer_types": ["full_attention"]} if arch == "gemma3_text" else {}
    return kvpass.capture_model(tiny_model(arch, dtype=dtype, num_hidden_layers=1, **full))


@functools.cache
def model_with(name: str, arch: str = "llama", dtype: torch.dtype = torch.float32) -> kvpass.CompiledModel:
    """Compiled with a press of the registry."""
    press = press_by_name(name, 1)
    return kvpass.compile(one_layer(arch, dtype), press, 0.5 if press.needs_budget else None, backend="eager")


@functools.lru_cache(maxsize=2)  # hundreds of them would fill the memory
def long_prefill(name: str, arch: str, dtype: torch.dtype) -> tuple[Prompts, ExportedProgram]:
    """For the prompts that the press itself compresses, as a program for engines."""
    model = model_with(name, arch, dtype)
    prompts = prompts_of(model._recipe.press, model._recipe.budget, 1, LONGEST)[-1]
    return prompts, prefill_program(model, "tensorrt", prompts, 1, LONGEST)


def converted(name: str, arch: str, dtype: torch.dtype) -> "ConvertedPhase":
    """The network of `long_prefill`."""
    prompts, program = long_prefill(name, arch, dtype)
    return _converted(model_with(name, arch, dtype), "prefill", prompts.ranges, copy.deepcopy(program))


@dataclass
class ConvertedPhase:
    """The network of one phase."""

    spec: PhaseSpec
    network: Network

    def run(self, inputs: Named) -> Named:
        """The outputs by name, as the network computes them."""
        given = {port.name: inputs[port.name] for port in self.spec.inputs}
        found = evaluate(self.network.definition, given)
        return dict(zip((port.name for port in self.spec.outputs), found, strict=True))


def prefills(model: kvpass.CompiledModel) -> list[ConvertedPhase]:
    """The prefill of a model, or several where its press has others for short prompts."""
    recipe, layers = model._recipe, len(model._execution.layout.layers)
    return [
        _converted(
            model,
            "prefill",
            prompts.ranges,
            prefill_program(model, "tensorrt", prompts, 1, LONGEST),
        )
        for prompts in prompts_of(recipe.press, recipe.budget, layers, LONGEST)
    ]


def step(model: kvpass.CompiledModel, phase: Phase) -> ConvertedPhase:
    """Extend or decode, which are the same for all presses."""
    tokens = (1, 1) if phase is Phase.DECODE else (2, LONGEST)
    return _converted(model, phase.value, [tokens], step_program(model, "tensorrt", phase, 1, LONGEST))


def _converted(model: kvpass.CompiledModel, phase: str, tokens: list[tuple[int, int]], program: Any) -> ConvertedPhase:
    spec = phase_spec(phase, phase, tokens, program)
    extents = profile_of(spec, model._recipe.max_tokens, slots=(1, 100, MAX_TOKENS))
    return ConvertedPhase(spec, network_of(program, spec, extents, None))


def distinct_ids(tokens: int, seed: int = 0) -> Tensor:
    """Tokens that occur once: equal keys have scores that only rounding tells apart. i64[1, tokens]

    None of them is special: `generate` takes the padding token for padding.
    """
    return 3 + torch.randperm(250, generator=torch.Generator().manual_seed(seed))[None, :tokens]


def check_prompt(model: kvpass.CompiledModel, phases: list[ConvertedPhase], tokens: int) -> Named:
    """A prompt leaves what eager leaves of it: the same positions, and numbers that are equal but for rounding."""
    (phase,) = [phase for phase in phases if phase.spec.takes(tokens)]
    found, expected = phase.run({"input_ids": distinct_ids(tokens)}), model.prefill(distinct_ids(tokens))
    cache = expected.past_key_values
    torch.testing.assert_close(found["logits"], expected.logits, atol=2e-5, rtol=1e-4)
    assert found["next_position"].tolist() == list(cache.next_positions)
    assert torch.equal(found["lengths"], cache.lengths)
    for layer, shape in enumerate(model._execution.layout.layers):
        used = int(cache.lengths[layer, 0])
        if f"kept_{layer}" in found:
            assert torch.equal(found[f"kept_{layer}"][:, :, :used], cache.positions(layer))
        if shape.ring is None:
            for role, held in (("keys", cache.keys(layer)), ("values", cache.values(layer))):
                mine = found[f"{role}_{layer}"][:, :, :used]
                torch.testing.assert_close(mine, held[:, :, :used], atol=2e-5, rtol=1e-4)
    return found


def with_room(model: kvpass.CompiledModel, state: Named, phase: ConvertedPhase, room: int) -> Named:
    """The state that a prefill returned, its caches with free slots, as an extend or decode phase takes it."""
    found = {}
    for port in phase.spec.inputs:
        if port.name == "input_ids":
            continue
        old = state[port.name]
        if port.layer is not None:
            ring = model._execution.layout.layers[port.layer].ring
            new = old.new_zeros(*old.shape[:2], ring or old.shape[2] + room, *old.shape[3:])
            new[:, :, : old.shape[2]] = old
            old = new
        found[port.name] = old
    return found


@functools.cache
def _plain_step(captured: kvpass.CapturedModel, phase: Phase) -> ConvertedPhase:
    """That of a model without a press, which reads what any press left."""
    return step(kvpass.compile(captured, backend="eager"), phase)


def check_steps(captured: kvpass.CapturedModel, model: kvpass.CompiledModel, prompt: int, state: Named) -> None:
    """Behind a prompt of distinct tokens that left `state`, five tokens and then two single ones are as in eager.

    captured: the model that `model` was compiled from.
    """
    cache = model.prefill(distinct_ids(prompt)).past_key_values
    state = with_room(model, state, _plain_step(captured, Phase.DECODE), 40)
    for new in (torch.tensor([[7, 8, 9, 10, 11]]), torch.tensor([[5]]), torch.tensor([[6]])):
        phase = _plain_step(captured, Phase.EXTEND if new.shape[1] > 1 else Phase.DECODE)
        found = phase.run({"input_ids": new, **state})
        expected = model(input_ids=new, past_key_values=cache)
        torch.testing.assert_close(found.pop("logits"), expected.logits, atol=2e-5, rtol=1e-4)
        state = found
