"""Phases as serialized engines, one file each, and what runs them on a GPU."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

from kvpass.backends.tensorrt.conversion import Network, Range, convert, lower, output_names, profile_of, unsupported
from kvpass.backends.tensorrt.library import library
from kvpass.deployment.manifest import MANIFEST, Manifest, PhaseSpec
from kvpass.errors import PackageError
from kvpass.package_files import digests, write_texts

ENGINES = "engines.json"


def write(
    programs: Mapping[str, ExportedProgram],
    manifest: Manifest,
    texts: Mapping[str, str],
    path: Path,
    progress: Callable[[str], None],
    *,
    profile: Mapping[str, Range] | None = None,
    targets: Sequence[str] = (),
) -> None:
    """A folder with `<phase>.engine`, what they were built for, and the manifest.

    profile: least, usual and greatest number of new tokens by phase ("prefill", "extend"), and of "slots" of a cache;
        see `profile_of` for what it is otherwise.
    targets: compute capabilities such as "SM89", of the flavour for RTX; without them all that it has.

    Raises `PackageError` if TensorRT is not installed, or does not take a program.
    """
    flavour, version, profiles = library().flavour, library().version, {}
    path.mkdir()
    for spec in manifest.phases:
        progress(f"building {spec.name}")
        network = network_of(programs[spec.name], spec, manifest, profile or {})
        (path / f"{spec.name}.engine").write_bytes(network.build(targets))
        profiles[spec.name] = {
            name: [extent.least, extent.usual, extent.most] for name, extent in network.profile.items()
        }
    told = {"flavour": flavour, "version": version, "targets": list(targets), "profiles": profiles}
    (path / ENGINES).write_text(json.dumps(told, indent=1) + "\n")
    write_texts(texts, path)
    (path / MANIFEST).write_text(replace(manifest, files=digests(path)).to_json())


def network_of(program: ExportedProgram, spec: PhaseSpec, manifest: Manifest, profile: Mapping[str, Range]) -> Network:
    """The network of one phase. Raises `PackageError` that names the operators which TensorRT does not take."""
    lowered = lower(program)
    if missing := unsupported(lowered):
        found = ", ".join(dict.fromkeys(f"{node.target} ({node.name})" for node in missing))
        raise PackageError(
            f"{spec.name} of {manifest.press or 'no press'}: TensorRT has no {found}; an engine must hold the whole "
            "graph, so take another press or format"
        )
    sizes = profile_of(spec, manifest.max_tokens, tokens=profile.get(spec.phase), slots=profile.get("slots"))
    return convert(lowered, sizes, output_names(spec))


class Runner:
    """Runs the engines of a folder on the current CUDA device; each holds its own copy of the weights."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        if not torch.cuda.is_available():
            raise PackageError(f"{path} holds engines for a CUDA device, and there is none")
        trt, told = library().trt, json.loads((path / ENGINES).read_text())
        if (told["flavour"], told["version"]) != (library().flavour, library().version):
            raise PackageError(
                f"{path} was built by {told['flavour']} {told['version']}, this is {library().flavour} "
                f"{library().version}; export the model again"
            )
        self._phases = {phase.name: phase for phase in manifest.phases}
        self._runtime, self._contexts = trt.Runtime(trt.Logger(trt.Logger.ERROR)), {}
        for name in self._phases:
            engine = self._runtime.deserialize_cuda_engine((path / f"{name}.engine").read_bytes())
            if engine is None:
                raise PackageError(f"{path}: {name}.engine does not suit this GPU; export the model for it")
            self._contexts[name] = engine.create_execution_context()

    def run(self, phase: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs of a phase by name, the whole state among them."""
        spec, context = self._phases[phase], self._contexts[phase]
        given = {port.name: inputs[port.name].contiguous() for port in spec.inputs}  # alive until all is enqueued
        for name, tensor in given.items():
            if not context.set_input_shape(name, tuple(tensor.shape)):
                raise PackageError(f"{phase}: {name} {list(tensor.shape)} is outside of what the engine was built for")
            context.set_tensor_address(name, tensor.data_ptr())
        if missing := context.infer_shapes():
            raise PackageError(f"{phase}: the engine lacks {missing}")
        outputs = {}
        for port, name in zip(spec.outputs, output_names(spec), strict=True):
            shape, dtype = tuple(context.get_tensor_shape(name)), getattr(torch, port.dtype)
            outputs[port.name] = torch.empty(shape, dtype=dtype, device="cuda")
            context.set_tensor_address(name, outputs[port.name].data_ptr())
        stream = torch.cuda.current_stream()
        if not context.execute_async_v3(stream.cuda_stream):
            raise PackageError(f"{phase}: TensorRT failed; what it logged just before says why")
        for tensor in given.values():
            tensor.record_stream(stream)
        return outputs
