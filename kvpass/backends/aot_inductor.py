"""Phases compiled ahead of time, all in one .pt2 archive with their weights once; loaded without pickle."""

import hashlib
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.pt2_archive._package import PT2ArchiveWriter

from kvpass.deployment.manifest import Manifest
from kvpass.errors import PackageError

MANIFEST = "extra/kvpass.json"
# The library of each phase would hold a copy of the weights.
OPTIONS = {"aot_inductor.package": True, "aot_inductor.package_constants_in_so": False}


def write(
    programs: Mapping[str, ExportedProgram],
    manifest: Manifest,
    texts: Mapping[str, str],
    path: Path,
    progress: Callable[[str], None],
) -> None:
    """Compile every phase and write all to one archive, whose name ends in .pt2."""
    made: dict[str, list[Path]] = {}
    for name, program in programs.items():
        progress(f"compiling {name}")
        arguments, _ = program.example_inputs or ((), {})
        files: Any = torch._inductor.aot_compile(program.module(), arguments, options=OPTIONS)
        made[name] = [Path(file) for file in files]
    progress("writing")
    archive = _Archive(path)
    for name, files in made.items():
        for file in files:
            archive.add(f"data/aotinductor/{name}/{file.name}", file.read_bytes())
    for name, text in texts.items():
        archive.add(f"extra/{name}", text.encode())
    weights = {name: archive.add_weights(_tensors(p)) for name, p in programs.items()}
    archive.finish(replace(manifest, weights=weights, records=archive.records, files=archive.digests))


def read_manifest(path: Path) -> Manifest:
    """The manifest of an archive. Raises `PackageError` if it is none of ours, or is not what was written."""
    try:
        with zipfile.ZipFile(path) as archive:
            root = archive.namelist()[0].split("/")[0]
            manifest = Manifest.from_json(archive.read(f"{root}/{MANIFEST}").decode(), str(path))
            for name, wanted in manifest.files.items():
                with archive.open(f"{root}/{name}") as record:
                    if hashlib.file_digest(record, "sha256").hexdigest() != wanted:  # type: ignore[arg-type]
                        raise PackageError(f"{path}: {name} is not what was exported; copy the file again")
    except (zipfile.BadZipFile, LookupError, UnicodeDecodeError) as error:
        raise PackageError(f"{path} is no complete package that CompiledModel.export wrote: {error}") from error
    return manifest


def read_texts(path: Path) -> dict[str, str]:
    """The files beside the manifest by their paths; none if it is not one of our archives."""
    try:
        with zipfile.ZipFile(path) as archive:
            root = archive.namelist()[0].split("/")[0]
            return {
                name.removeprefix(f"{root}/extra/"): archive.read(name).decode()
                for name in archive.namelist()
                if name.startswith(f"{root}/extra/")
            }
    except (zipfile.BadZipFile, LookupError, UnicodeDecodeError):
        return {}


class Runner:
    """Runs the phases of an archive; their weights are read where they lie in the file, and shared."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self._phases = {phase.name: phase for phase in manifest.phases}
        stored = _stored_weights(path, manifest)
        self._loaders = {}
        for name in self._phases:
            loader = torch._C._aoti.AOTIModelPackageLoader(str(path), name, False, 1, -1)
            known = {name: stored[record] for name, record in manifest.weights[name].items()}
            if missing := set(loader.get_constant_fqns()) - set(known):
                raise PackageError(f"{path}: {name} lacks the weights {sorted(missing)}; export the model again")
            # user managed: no copy; a library that is run before this would crash
            loader.load_constants({name: known[name] for name in loader.get_constant_fqns()}, False, True, True, False)
            self._loaders[name] = loader
        self._stored = stored  # must outlive the libraries

    def run(self, phase: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs of a phase by name; the state among the inputs is updated in place."""
        spec = self._phases[phase]
        outputs = self._loaders[phase].boxed_run([inputs[port.name] for port in spec.inputs])
        return {port.name: value for port, value in zip(spec.outputs, outputs, strict=True)}


class _Archive:
    """An archive that is being written."""

    def __init__(self, path: Path) -> None:
        self._writer = PT2ArchiveWriter(str(path))
        self._first: dict[object, str] = {}
        self.records: dict[str, dict[str, Any]] = {}
        self.digests: dict[str, str] = {}

    def add(self, name: str, data: bytes) -> None:
        self._writer.write_bytes(name, data)
        self.digests[name] = hashlib.sha256(data).hexdigest()

    def add_weights(self, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        """Write those that are not there yet; the record of each."""
        found = {}
        for name, tensor in tensors.items():
            place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
            if place not in self._first:
                record = f"data/weights/weight_{len(self.records)}"
                facts = {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
                self._first[place], self.records[record] = record, {**facts, "stride": list(tensor.stride())}
                self.add(record, _bytes(tensor))
            found[name] = self._first[place]
        return found

    def finish(self, manifest: Manifest) -> None:
        self._writer.write_string(MANIFEST, manifest.to_json())
        with self._writer:  # writes the end
            pass


def _tensors(program: ExportedProgram) -> dict[str, Tensor]:
    named = {**program.state_dict, **program.constants}
    return {name: value for name, value in named.items() if isinstance(value, Tensor)}


def _bytes(tensor: Tensor) -> bytes:
    """What lies between the first and the last number of a tensor."""
    span = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    numbers = tensor.detach().cpu().as_strided((span,), (1,)) if tensor.numel() else tensor.detach().flatten()
    return numbers.view(torch.uint8).numpy().tobytes()


def _stored_weights(path: Path, manifest: Manifest) -> dict[str, Tensor]:
    """All weights by record, on the device that the package is for."""
    memory = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=path.stat().st_size)  # mapped, not read
    found = {}
    with zipfile.ZipFile(path) as archive:
        root = archive.namelist()[0].split("/")[0]
        for record, facts in manifest.records.items():
            dtype = getattr(torch, facts["dtype"])
            start = _offset(path, archive.getinfo(f"{root}/{record}")) // dtype.itemsize
            view: Tensor = torch.empty(0, dtype=dtype).set_(memory, start, facts["shape"], facts["stride"])  # type: ignore[arg-type]
            found[record] = view.to(manifest.device)
    return found


def _offset(path: Path, record: zipfile.ZipInfo) -> int:
    """Where the bytes of a record begin: behind its header of 30 bytes, a name and padding, of lengths found there."""
    with path.open("rb") as file:
        file.seek(record.header_offset + 26)
        name, padding = (int.from_bytes(file.read(2), "little") for _ in range(2))
    return record.header_offset + 30 + name + padding
