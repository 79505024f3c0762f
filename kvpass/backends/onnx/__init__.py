"""Phases as ONNX models that share one file of weights, and ONNX Runtime to run them."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor
from torch.export import ExportedProgram

from kvpass.deployment.manifest import MANIFEST, Manifest
from kvpass.errors import PackageError
from kvpass.package_files import digests, write_texts

INSTALL = "pip install 'kvpass[onnx]'"


def write(
    programs: Mapping[str, ExportedProgram],
    manifest: Manifest,
    texts: Mapping[str, str],
    path: Path,
    progress: Callable[[str], None],
    *,
    for_tensorrt: bool = False,
) -> None:
    """A folder with `<phase>.onnx`, the weights of all phases and the manifest."""
    write_phases(programs, path, progress, for_tensorrt=for_tensorrt)
    write_texts(texts, path)
    (path / MANIFEST).write_text(replace(manifest, files=digests(path)).to_json())


def write_phases(
    programs: Mapping[str, ExportedProgram],
    folder: Path,
    progress: Callable[[str], None] = lambda step: None,
    *,
    for_tensorrt: bool = False,
) -> None:
    """Write `<phase>.onnx` for each functional program, and the tensors of all of them to one file, each once.

    Inputs and outputs have the program's names, but that new state is called `keys_0_out`. Raises `PackageError` where
    ONNX, or ONNX Runtime on a CPU, could not do the same, before anything is written; `for_tensorrt` they may be
    bfloat16, which its parser reads.
    """
    _need("onnx", "onnxscript")
    from kvpass.backends.onnx.convert import converted
    from kvpass.backends.onnx.files import write_models

    models = {}
    for name, program in programs.items():
        progress(f"converting {name}")
        models[name] = converted(name, program, for_tensorrt=for_tensorrt)
    progress("writing")
    folder.mkdir(exist_ok=True)
    write_models(models, folder)


class OnnxRunner:
    """Runs the phases of a folder with ONNX Runtime, on its CPU provider. The weights are mapped, not read."""

    def __init__(self, folder: Path, phases: Sequence[str], threads: int | None = None) -> None:
        _need("onnxruntime")
        from kvpass.backends.onnx.session import Session, session_options

        options = session_options(threads)
        self._sessions = {phase: Session(folder / f"{phase}.onnx", options) for phase in phases}

    def run(self, phase: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs of a phase by name; the state among the inputs is updated in place and is not among them."""
        return self._sessions[phase].run(inputs)


class Runner(OnnxRunner):
    """Runs a package."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        if any(layer.dtype == "bfloat16" for layer in manifest.layers):
            raise PackageError(
                f"{path} is bfloat16, for which ONNX Runtime has no CPU kernels; TensorRT's parser reads it"
            )
        super().__init__(path, [phase.name for phase in manifest.phases])


def _need(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise PackageError(f"{' and '.join(missing)} must be installed for ONNX; run: {INSTALL}")
