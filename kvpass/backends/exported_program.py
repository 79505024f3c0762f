"""Phases as files of torch.export, which torch alone can run."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

from kvpass.deployment.manifest import MANIFEST, Manifest
from kvpass.package_files import digests, write_texts


def write(
    programs: Mapping[str, ExportedProgram],
    manifest: Manifest,
    texts: Mapping[str, str],
    path: Path,
    progress: Callable[[str], None],
) -> None:
    """A folder with `<phase>.pt2` for `torch.export.load`, each complete, and the manifest."""
    path.mkdir()
    for name, program in programs.items():
        progress(f"writing {name}")
        torch.export.save(program, path / f"{name}.pt2")
    write_texts(texts, path)
    (path / MANIFEST).write_text(replace(manifest, files=digests(path)).to_json())


class Runner:
    """Runs the programs of a folder, operator by operator; their weights are held once."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self._phases = {phase.name: phase for phase in manifest.phases}
        self._modules = {name: torch.export.load(path / f"{name}.pt2").module() for name in self._phases}
        shared: dict[str, Tensor] = {}
        for module in self._modules.values():
            own = module.state_dict(keep_vars=True)
            module.load_state_dict({name: shared.setdefault(name, tensor) for name, tensor in own.items()}, assign=True)

    def run(self, phase: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs of a phase by name; the state among the inputs is updated in place."""
        with torch.no_grad():
            outputs: dict[str, Tensor] = self._modules[phase](*[inputs[p.name] for p in self._phases[phase].inputs])
        return outputs
