"""Graphs on disk, so that a second process neither exports a model again nor runs the passes.

What is stored is found by content: the source of kvpass, the releases of torch and transformers, the model's modules,
config, parameters, and the passes with their options. Only the graph is stored, as JSON, and tensors that the model
does not have; nothing in a file is executed. A model with code that is not torch's or transformers' is not stored,
since what it calls may change unseen.
"""

import functools
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import logging
import os
import platform
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kvpass.cache_folder import cache_folder
from kvpass.ir.files import NotStorableError, program_from_json, program_to_json
from kvpass.ir.program import KVProgram
from kvpass.pass_manager import Pass, PassRecord

log = logging.getLogger(__name__)
ENVIRONMENT = "KVPASS_GRAPH_CACHE"  # another folder; 0: nothing is stored
LOOKS_AT_GRAPHS = ("KVPASS_PRINT_IR", "KVPASS_DUMP_DIR", "KVPASS_VERIFY")  # passes have to run then

DAMAGED = (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError, NotStorableError)

Stored = tuple[KVProgram, list[PassRecord]]


@dataclass(frozen=True)
class GraphStore:
    """The graphs of one captured model."""

    folder: Path
    tensors: Mapping[str, Tensor]  # the model's own, by name
    changes: bool = True  # whether graphs are added
    assets: bool = False  # whether those are stored that hold tensors of a press, whose file may change

    def load(self, name: str) -> Stored | None:
        """What was saved under this name, if anything."""
        path = self.folder / f"{name}.json"
        if not path.is_file():
            return None
        try:
            data = json.loads(path.read_text())
            own = load_file(path.with_suffix(".safetensors")) if data["own"] else {}
            device = next(iter(self.tensors.values())).device
            tensors = {**self.tensors, **{key: tensor.to(device) for key, tensor in own.items()}}
            program = program_from_json(data["program"], tensors)
        except DAMAGED as error:
            log.warning("%s is damaged (%s: %s) and is written again", path, type(error).__name__, error)
            return None
        return program, [PassRecord(**record) for record in data["records"]]

    def save(self, name: str, program: KVProgram, records: Sequence[PassRecord]) -> None:
        """Store a program; one that has no form in a file is left out, and so is everything on a full disk."""
        if not self.changes:
            return
        try:
            told = program_to_json(program)
        except NotStorableError as error:
            log.info("not stored: %s", error)
            return
        held = {str(n.target): program.attribute(n) for n in program.graph.nodes if n.op == "get_attr"}
        own = {key: tensor for key, tensor in held.items() if self.tensors.get(key) is not tensor}
        if not self.assets and any(key.startswith("press_") for key in own):
            log.info("not stored: the press reads tensors from a file of its own, which may change")
            return
        data = {"program": told, "records": [asdict(record) for record in records], "own": sorted(own)}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.folder) as scratch:  # a file of the final name is complete
                if own:
                    tensors = {key: tensor.detach().contiguous().clone() for key, tensor in own.items()}
                    save_file(tensors, Path(scratch) / "tensors")
                    os.replace(Path(scratch) / "tensors", self.folder / f"{name}.safetensors")
                (Path(scratch) / "graph").write_text(json.dumps(data))
                os.replace(Path(scratch) / "graph", self.folder / f"{name}.json")
        except OSError as error:
            log.warning("graphs are not stored in %s: %s", self.folder, error)


def store_of(model: object, *facts: object) -> GraphStore | None:
    """Where the graphs of a model are, as it is captured with these options; None if they cannot be stored."""
    root = os.environ.get(ENVIRONMENT) or str(cache_folder() / "graphs")
    if root == "0" or passes_are_watched():
        return None
    if not isinstance(model, nn.Module) or not all(map(_is_well_known, model.modules())):
        return None
    named = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    digest = hashlib.sha256(f"{_sources()} {platform.python_version()} {facts} {model}".encode())
    for part in model.modules():
        digest.update(f"{type(part).__module__}.{type(part).__qualname__}".encode())
    for path in sorted({inspect.getfile(type(part)) for part in model.modules()}):  # edited in place, the release stays
        digest.update(Path(path).read_bytes())
    if (config := getattr(model, "config", None)) is not None:
        digest.update(f"{config} {getattr(config, '_attn_implementation', None)}".encode())
    for name, tensor in sorted(named.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {tensor.device}".encode())
        digest.update(tensor.detach().flatten()[:16].to(torch.float64).cpu().numpy().tobytes())
    return GraphStore(Path(root) / digest.hexdigest()[:32], named)


def passes_are_watched() -> bool:
    """Whether somebody wants to see every pass run."""
    return any(os.environ.get(name) for name in LOOKS_AT_GRAPHS)


def name_of(steps: Sequence[Pass]) -> str | None:
    """What the graph that these passes make is called; None where an option has code that is not ours."""
    if not all(_is_ours(step) for step in steps):
        return None
    return hashlib.sha256(repr(tuple(steps)).encode()).hexdigest()[:32]


def _is_ours(value: Any) -> bool:
    """Whether `repr` tells all about an option of a pass."""
    if is_dataclass(value) and not isinstance(value, type):
        return type(value).__module__.startswith("kvpass.") and all(
            _is_ours(getattr(value, field.name)) for field in fields(value)
        )
    if isinstance(value, tuple | frozenset):
        return all(map(_is_ours, value))
    return value is None or isinstance(value, bool | int | float | str) or type(value).__module__ == "kvpass.ir.form"


def _is_well_known(module: nn.Module) -> bool:
    """Whether a module runs code of torch or transformers alone."""
    if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
        return False
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and Path(code.co_filename).is_relative_to(_home(type(module).__module__))


@functools.cache
def _home(module: str) -> Path:
    """The folder of torch or transformers, if a module of theirs is asked for."""
    package = module.partition(".")[0]
    found = importlib.util.find_spec(package) if package in ("torch", "transformers") else None
    return Path(found.origin).parent if found is not None and found.origin else Path("/nowhere")


@functools.cache
def _sources() -> str:
    """Tells releases of kvpass, torch and transformers apart, and every edit of kvpass."""
    digest = hashlib.sha256(f"{torch.__version__} {importlib.metadata.version('transformers')}".encode())
    folder = Path(inspect.getfile(GraphStore)).parent
    for path in sorted([*folder.rglob("*.py"), *(folder / "passes").glob("*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()
