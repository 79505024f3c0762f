"""`kvpass.compile`: a model in, a model that compresses its own cache out."""

import copy
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from transformers import GenerationConfig, PretrainedConfig

from kvpass.backends import TENSORRT, get_ready
from kvpass.backends.engine_sizes import Profile, checked_profile
from kvpass.budget import Budget
from kvpass.capture import capture
from kvpass.deployment.deployed import DeployedModel
from kvpass.deployment.export import is_exported, load_exported
from kvpass.errors import InputError, PackageError, PressError, UnsupportedModelError
from kvpass.graph_store import store_of
from kvpass.ir.attention_site import attention_sites
from kvpass.ir.program import KVProgram
from kvpass.pass_manager import PassManager, PassRecord
from kvpass.pipeline import capture_passes
from kvpass.press import Press
from kvpass.registry import resolve_press
from kvpass.runtime.execution import Recipe
from kvpass.runtime.layout import CacheLayout, LayerLayout
from kvpass.runtime.model import CompiledModel
from kvpass.runtime.model_files import read_model
from kvpass.runtime.phases import PhaseGraphs, PrintIR


@dataclass(frozen=True, eq=False)
class CapturedModel:
    """A model that was exported and located once, to be compiled with any number of presses.

    They share all graphs that do not depend on the press, also what torch.compile made of them. Equal to itself alone.
    """

    graphs: PhaseGraphs
    config: PretrainedConfig
    generation_config: GenerationConfig
    model_id: str
    max_tokens: int
    records: tuple[PassRecord, ...]


def capture_model(
    model: nn.Module | ExportedProgram,
    *,
    max_tokens: int | None = None,
    config: PretrainedConfig | None = None,
    generation_config: GenerationConfig | None = None,
    print_ir: PrintIR = None,
) -> CapturedModel:
    """Export `model` and locate its attentions: the slow part of `compile`, for when several presses are tried.

    config, generation_config: what `generate` goes by, for a model that brings none of its own; defaults will do.
    max_tokens: the longest text that will be read, by default what the model's config says. RoPE of type "dynamic" or
    "longrope", which has other frequencies for long texts, gets those for texts of this length, whatever their length.
    Raises `UnsupportedModelError` if the model cannot be captured or an attention not be located.
    """
    if not isinstance(model, nn.Module | ExportedProgram):
        raise UnsupportedModelError(
            f"the model is a {type(model).__name__}, expected a torch module or an ExportedProgram; load a "
            "checkpoint by its name with transformers.AutoModelForCausalLM.from_pretrained first"
        )
    config = copy.deepcopy(config or _config_of(model))
    store = store_of(model, max_tokens) if print_ir is None else None
    if store is not None and (stored := store.load("located")) is not None:
        program, records = stored
    else:
        manager = PassManager(capture_passes(), print_ir=print_ir)
        program, records = manager.run(capture(model, max_tokens=max_tokens)), manager.records
        if store is not None:
            store.save("located", program, records)
    program.model_name = str(config.name_or_path or "")
    generation_config = copy.deepcopy(generation_config or _generation_config_of(model))
    return CapturedModel(
        PhaseGraphs(program, store),
        config,
        generation_config,
        _fingerprint(model),
        program.max_tokens,
        tuple(records),
    )


def compile(
    model: nn.Module | ExportedProgram | CapturedModel,
    press: str | Press | object | None = None,
    ratio: float | None = None,
    *,
    target_size: int | None = None,
    delimiter: int | None = None,
    layers: Iterable[int] | Callable[[int], bool] | None = None,
    backend: str | Callable[..., Any] = "inductor",
    mode: str | None = None,
    profile: Profile | None = None,
    capacity: int | None = None,
    max_tokens: int | None = None,
    config: PretrainedConfig | None = None,
    generation_config: GenerationConfig | None = None,
    print_ir: PrintIR = None,
) -> CompiledModel:
    """Capture `model` and fuse KV-cache compression into its graph; the model itself stays as it is.

    model: a causal LM of transformers, a module with forward(input_ids) or forward(input_ids, position_ids) -> logits,
        a program that torch.export made of one (dynamic batch and length), or what `capture_model` returned.
    press: a name (`kvpass.registered_presses()`), with options if wanted ("chunkkv(snapkv, chunk_length=16)"), a press
        object, also one of kvpress, or None: compiled, nothing is dropped.
    ratio: the fraction of key/value pairs that a prompt loses, 0 <= ratio < 1.
    target_size: instead of a ratio, the number of pairs that each KV head keeps; shorter prompts stay whole.
    delimiter: the token id between context and question, for a press that compresses for a question (finch). It is
        taken out of the prompt, so it may be any id that occurs nowhere else.
    layers: which layers to press, by index or as a predicate; all by default. The others keep everything, those with a
        sliding window always do.
    backend, mode: as for `torch.compile`; backend="eager" runs the graph as it is. Compilation happens at the first
        call of each phase (prefill, extend, decode). backend="tensorrt" builds engines for the GPU that the model is
        on, one for each phase and number of rows.
    profile: of "tensorrt", the least, usual and greatest number of new tokens by phase ("prefill", "extend"), and of
        "slots" of a cache, that engines are built for; by default all that can occur.
    capacity: slots per layer that are allocated at once and never exceeded; None lets the cache grow.
    max_tokens, config, generation_config: see `capture_model`.
    print_ir: as `KVPASS_PRINT_IR`, or a function of pass name and graph text.

    Raises `PressError` for an unknown press or bad options, `MissingTapError` if the press reads a tensor that the
    model does not have, `UnsupportedModelError` if the model cannot be captured or an attention not be located.
    """
    chosen, own_ratio = resolve_press(press)
    if delimiter is not None:
        chosen = _with_delimiter(chosen, delimiter)
    if ratio is None and target_size is None:
        ratio = own_ratio
    if chosen is None and (ratio or target_size is not None):
        raise PressError(f"ratio={ratio}, target_size={target_size} without a press: say which, e.g. press='snapkv'")
    if chosen is not None and chosen.needs_budget and ratio is None and target_size is None:
        raise PressError(f"press {chosen.name!r} without a budget: give ratio= (fraction removed) or target_size=")
    if chosen is not None and not chosen.needs_budget and (ratio is not None or target_size is not None):
        raise PressError(
            f"press {chosen.name!r} says itself what it keeps; leave out ratio={ratio} and target_size={target_size}"
        )
    budget = Budget(ratio, target_size)
    if chosen is not None and chosen.needs_budget and budget.keeps_all:
        chosen = None
    get_ready(backend)
    captured = model
    if not isinstance(captured, CapturedModel):
        captured = capture_model(
            captured,
            max_tokens=max_tokens,
            config=config,
            generation_config=generation_config,
            print_ir=print_ir,
        )
    elif max_tokens not in (None, captured.max_tokens):
        raise InputError(f"max_tokens={max_tokens}: the model was captured for {captured.max_tokens}; capture it anew")
    selected = _selected(captured.graphs.located, layers)
    if profile is not None and backend != TENSORRT:
        raise InputError(f"profile={profile} is for backend={TENSORRT!r}, not {backend!r}")
    sizes = None if profile is None else checked_profile(profile)
    compiled = CompiledModel(
        captured.graphs,
        CacheLayout(
            _layers(captured.graphs.located, chosen, selected),
            captured.model_id,
            capacity,
            whole_rings=backend == TENSORRT,
        ),
        Recipe(chosen, budget, backend, mode, captured.max_tokens, selected, print_ir, sizes),
        copy.deepcopy(captured.config),
        copy.deepcopy(captured.generation_config),
        captured.records,
    )
    if chosen is not None or backend == TENSORRT:
        compiled.graph("prefill")  # what does not fit the model or the machine fails here, not at the first prompt
    return compiled.eval()


def load(path: str | Path) -> CompiledModel | DeployedModel:
    """What `CompiledModel.save` or `CompiledModel.export` wrote: nothing is captured, no pass runs.

    A saved model is a `CompiledModel` again. An exported one is a `DeployedModel`, with `generate`, `prefill` and
    `append`. Nothing is unpickled; but the code in an AOTInductor package is machine code, so trust where it is from.
    Raises `PackageError` for something else, for files that have changed, and for other releases of kvpass or torch.
    """
    if is_exported(Path(path)):
        return load_exported(Path(path))
    stored = read_model(path)
    facts = stored.facts
    found = stored.store.load("located")
    if found is None:
        raise PackageError(f"{path} holds no graph; copy the folder again")
    program, records = found
    graphs = PhaseGraphs(program, stored.store)
    captured = CapturedModel(
        graphs, stored.config, stored.generation_config, facts["model_id"], facts["max_tokens"], tuple(records)
    )
    options = {name: facts[name] for name in ("target_size", "layers", "backend", "mode", "capacity", "profile")}
    return compile(captured, facts["press"], facts["ratio"], **options)


def _with_delimiter(press: Press | None, delimiter: int) -> Press:
    if press is None or not hasattr(press, "delimiter"):
        raise PressError(f"delimiter={delimiter}: {press.name if press else 'no press'} asks for none, finch does")
    return replace(press, delimiter=delimiter)  # type: ignore[call-arg]


def _selected(located: KVProgram, layers: Iterable[int] | Callable[[int], bool] | None) -> frozenset[int] | None:
    if layers is None:
        return None
    sites = attention_sites(located)
    chosen = {site.layer for site in sites if layers(site.layer)} if callable(layers) else set(layers)
    if unknown := sorted(chosen - {site.layer for site in sites}):
        raise PressError(f"layers={unknown}: the model has layers 0 to {len(sites) - 1}")
    named = [site for site in sites if site.layer in chosen and not callable(layers)]
    if windowed := [site.layer for site in named if site.bounded]:
        raise PressError(f"layers={windowed} see a window or a chunk and keep that alone; press the others")
    if shared := {site.layer: site.holder for site in named if not site.holds_cache}:
        raise PressError(
            f"layers={list(shared)} read the keys of layers {sorted(set(shared.values()))} and see what those keep; "
            "press those"
        )
    if not any(site.pressable and site.layer in chosen for site in sites):
        raise PressError(f"layers={sorted(chosen)}: no layer is left to press; use press=None")
    return frozenset(chosen)


def _layers(located: KVProgram, press: Press | None, selected: frozenset[int] | None) -> tuple[LayerLayout, ...]:
    layers = []
    for site in attention_sites(located):
        keys, values = site.keys.meta["val"], site.values.meta["val"]
        layers.append(
            LayerLayout(
                heads=int(keys.shape[1]),
                key_size=int(keys.shape[3]),
                value_size=int(values.shape[3]),
                dtype=str(keys.dtype).removeprefix("torch."),
                pressed=press is not None and site.pressable and (selected is None or site.layer in selected),
                ring=site.mask.reach,
                tracks_positions=site.tracks_positions,
                reads=None if site.holds_cache else site.holder,
            )
        )
    return tuple(layers)


def _fingerprint(model: nn.Module | ExportedProgram) -> str:
    """Tells models apart: names, shapes and the first numbers of all parameters."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        sample = parameter.detach().flatten()[:16].to(torch.float64).cpu()
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def _config_of(model: nn.Module | ExportedProgram) -> PretrainedConfig:
    config = getattr(model, "config", None)
    return config if isinstance(config, PretrainedConfig) else PretrainedConfig()


def _generation_config_of(model: nn.Module | ExportedProgram) -> GenerationConfig:
    config = getattr(model, "generation_config", None)
    return config if isinstance(config, GenerationConfig) else GenerationConfig()
