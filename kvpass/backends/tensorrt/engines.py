"""Phases as engines, serialized to one file each, and what runs them on a GPU."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

from kvpass.backends.engine_sizes import Profile
from kvpass.backends.tensorrt.conversion import Extents, Network, convert, lower, output_names, profile_of, unsupported
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
    profile: Profile | None = None,
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
        sizes = profile or {}
        extents = profile_of(spec, manifest.max_tokens, tokens=sizes.get(spec.phase), slots=sizes.get("slots"))
        network = network_of(programs[spec.name], spec, extents, manifest.press)
        (path / f"{spec.name}.engine").write_bytes(network.build(targets))
        profiles[spec.name] = {
            name: [extent.least, extent.usual, extent.most] for name, extent in network.profile.items()
        }
    told = {"flavour": flavour, "version": version, "targets": list(targets), "profiles": profiles}
    (path / ENGINES).write_text(json.dumps(told, indent=1) + "\n")
    write_texts(texts, path)
    (path / MANIFEST).write_text(replace(manifest, files=digests(path)).to_json())


def network_of(program: ExportedProgram, spec: PhaseSpec, extents: Extents, press: str | None) -> Network:
    """The network of one phase. Raises `PackageError` that names the operators which TensorRT does not take."""
    lowered = lower(program)
    if missing := unsupported(lowered):
        found = ", ".join(dict.fromkeys(f"{node.target} ({node.name})" for node in missing))
        raise PackageError(
            f"{spec.name} of {press or 'no press'}: TensorRT has no {found}; an engine must hold the whole graph, so "
            "take another press or format"
        )
    return convert(lowered, extents, output_names(spec))


class Engine:
    """One phase on the current CUDA device; it holds its own copy of the weights."""

    def __init__(self, plan: bytes, spec: PhaseSpec) -> None:
        """Raises `PackageError` if the plan was built for other GPUs."""
        trt = library().trt
        self._spec, self._runtime = spec, trt.Runtime(trt.Logger(trt.Logger.ERROR))
        engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise PackageError(f"the engine of {spec.name} does not suit this GPU; export the model for it")
        self._context = engine.create_execution_context()

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs by name, the whole state among them. Raises `PackageError` for sizes it was not built for."""
        spec, context = self._spec, self._context
        given = {port.name: inputs[port.name].contiguous() for port in spec.inputs}  # alive until all is enqueued
        for name, tensor in given.items():
            if not context.set_input_shape(name, tuple(tensor.shape)):
                raise PackageError(
                    f"{spec.name}: {name} {list(tensor.shape)} is outside of what the engine was built for; give "
                    "profile= with greater sizes"
                )
            context.set_tensor_address(name, tensor.data_ptr())
        if missing := context.infer_shapes():
            raise PackageError(f"{spec.name}: the engine lacks {missing}")
        outputs = {}
        for port, name in zip(spec.outputs, output_names(spec), strict=True):
            shape, dtype = tuple(context.get_tensor_shape(name)), getattr(torch, port.dtype)
            outputs[port.name] = torch.empty(shape, dtype=dtype, device="cuda")
            context.set_tensor_address(name, outputs[port.name].data_ptr())
        stream = torch.cuda.current_stream()
        if not context.execute_async_v3(stream.cuda_stream):
            raise PackageError(f"{spec.name}: TensorRT failed; what it logged just before says why")
        for tensor in given.values():
            tensor.record_stream(stream)
        return outputs


class Runner:
    """Runs the engines of a folder."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        if not torch.cuda.is_available():
            raise PackageError(f"{path} holds engines for a CUDA device, and there is none")
        told = json.loads((path / ENGINES).read_text())
        if (told["flavour"], told["version"]) != (library().flavour, library().version):
            raise PackageError(
                f"{path} was built by {told['flavour']} {told['version']}, this is {library().flavour} "
                f"{library().version}; export the model again"
            )
        self._engines = {
            phase.name: Engine((path / f"{phase.name}.engine").read_bytes(), phase) for phase in manifest.phases
        }

    def run(self, phase: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs of a phase by name, the whole state among them."""
        return self._engines[phase].run(inputs)
