"""A compiled model as a folder: graphs and facts as JSON, weights as safetensors; nothing in it is executed."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from kvpass.errors import PackageError
from kvpass.graph_store import GraphStore, name_of
from kvpass.ir.form import Phase
from kvpass.package_files import check_files, digests, new_target, versions
from kvpass.registry import press_text
from kvpass.runtime.model import CompiledModel

FORMAT = "kvpass-model-1"
MANIFEST, WEIGHTS, GRAPHS = "manifest.json", "weights.safetensors", "graphs"


@dataclass(frozen=True)
class StoredModel:
    """What a folder holds."""

    store: GraphStore
    config: PretrainedConfig
    generation_config: GenerationConfig
    facts: dict[str, Any]  # model_id, max_tokens, and the options of `compile`


def save_model(model: CompiledModel, path: str | Path) -> None:
    """Write a new folder; it has its name when it is complete. Raises `PackageError` if it cannot be written."""
    target = Path(path)
    execution, recipe = model._execution, model._recipe
    if not isinstance(recipe.backend, str):
        raise PackageError(f"backend={recipe.backend!r} is a function, which no file holds; compile with a name")
    facts = {
        "model_id": execution.layout.model_id,
        "max_tokens": recipe.max_tokens,
        "press": press_text(recipe.press) if recipe.press else None,
        "ratio": recipe.budget.ratio,
        "target_size": recipe.budget.target_size,
        "layers": None if recipe.layers is None else sorted(recipe.layers),
        "backend": recipe.backend,
        "mode": recipe.mode,
        "profile": recipe.profile,
        "capacity": execution.layout.capacity,
        "device": str(model.device),
    }
    with new_target(target) as folder:
        folder.mkdir()
        tensors = {str(n.target): model._located.attribute(n) for n in model._located.graph.nodes if n.op == "get_attr"}
        names = _write_weights(tensors, folder / WEIGHTS)
        _write_graphs(model, GraphStore(folder / GRAPHS, tensors, assets=True))
        (folder / "config.json").write_text(model.config.to_json_string(use_diff=False))
        (folder / "generation_config.json").write_text(model.generation_config.to_json_string(use_diff=False))
        manifest = {"format": FORMAT, **versions(), "facts": facts, "names": names, "files": digests(folder)}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def read_model(path: str | Path) -> StoredModel:
    """What `save_model` wrote. Raises `PackageError` for anything else, and for files that have changed."""
    folder = Path(path)
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["format"] != FORMAT:
            raise ValueError(f"its format is {manifest['format']}, not {FORMAT}")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise PackageError(f"{folder} is no folder that CompiledModel.save wrote: {error}") from error
    written = {name: manifest.get(name) for name in versions()}
    if written != versions():
        told = (" and ".join(f"{name} {version}" for name, version in v.items()) for v in (written, versions()))
        raise PackageError(
            f"{folder} was saved by {next(told)}, this is {next(told)}; compile the model and save it again"
        )
    check_files(folder, manifest["files"])
    device = torch.device(manifest["facts"]["device"])
    if device.type == "cuda" and not torch.cuda.is_available():
        raise PackageError(f"{folder} was compiled for {device}, which is not here; compile the model for this machine")
    stored = load_file(folder / WEIGHTS, device=str(device))
    tensors: dict[str, Tensor] = {}
    for name, (source, is_parameter) in manifest["names"].items():
        tensors[name] = nn.Parameter(stored[source], requires_grad=False) if is_parameter else stored[source]
    for name, (source, _) in manifest["names"].items():  # tied weights stay tied
        tensors[name] = tensors.get(source, tensors[name])
    return StoredModel(
        GraphStore(folder / GRAPHS, tensors, changes=False),
        _config(folder / "config.json"),
        GenerationConfig.from_dict(json.loads((folder / "generation_config.json").read_text())),
        manifest["facts"],
    )


def _write_weights(tensors: Mapping[str, Tensor], path: Path) -> dict[str, tuple[str, bool]]:
    """Store every tensor once; under which name each of them is found, and whether it is a parameter."""
    first: dict[object, str] = {}
    names = {}
    for name, tensor in tensors.items():
        place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        names[name] = (first.setdefault(place, name), isinstance(tensor, nn.Parameter))
    save_file({name: tensors[name].detach().contiguous() for name in first.values()}, path)
    return names


def _write_graphs(model: CompiledModel, store: GraphStore) -> None:
    """The located graph, and those of the phases; one that has no form in a file is made by the passes again."""
    store.save("located", model._located, model._capture_records)
    if not (store.folder / "located.json").is_file():
        raise PackageError(
            "the graph of this model holds loops, or sizes that only data can tell, and has no form in a file"
        )
    for phase in Phase:
        press = model._example_press() if phase is Phase.PREFILL else None
        for one_row in (False, True) if phase is Phase.DECODE else (False,):
            name = name_of(model._execution.passes(phase, press, one_row=one_row))
            if name is not None:
                graph = model._execution.phase(phase, press, one_row=one_row)
                store.save(name, graph.program, graph.records)


def _config(path: Path) -> PretrainedConfig:
    told = json.loads(path.read_text())
    if told.get("model_type") in CONFIG_MAPPING:
        config: PretrainedConfig = AutoConfig.for_model(**told)
        return config
    return PretrainedConfig.from_dict(told)
