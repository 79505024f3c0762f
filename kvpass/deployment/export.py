"""`CompiledModel.export` and what `kvpass.load` makes of it."""

import importlib
from collections.abc import Callable, Collection
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.export import ExportedProgram

from kvpass.backends import streams_memory
from kvpass.budget import Prompt
from kvpass.deployment.deployed import DeployedModel, GuardedModel
from kvpass.deployment.diff import TEXTS, program_text
from kvpass.deployment.manifest import FORMAT, MANIFEST, LayerSpec, Manifest, PhaseSpec, phase_spec
from kvpass.deployment.phases import export_guarded, export_prefill, export_step
from kvpass.errors import PackageError, PressError
from kvpass.ir.form import Phase
from kvpass.ir.program import KVProgram
from kvpass.package_files import check_files, new_target
from kvpass.pass_manager import Pass
from kvpass.passes.lower_for_tensorrt import LowerForTensorRT
from kvpass.pipeline import phase_passes
from kvpass.prompts import Prompts, prompts_of
from kvpass.registry import press_text
from kvpass.runtime.model import CompiledModel

Progress = Callable[[str], None]
FORMATS = ("exported_program", "aot_inductor", "onnx", "tensorrt")
GUARDS = ("host", "in_graph")  # who decides whether a prompt is compressed
REPORTED = 2048  # tokens of the longest prompt of which a report tells
FUNCTIONAL = ("onnx", "tensorrt")  # take no graph that writes to its inputs


def export_model(
    model: CompiledModel,
    path: str | Path,
    format: str,
    *,
    guard: str = "host",
    batch_size: int = 1,
    max_tokens: int | None = None,
    capacity: int | None = None,
    progress: Progress = lambda step: None,
    for_tensorrt: bool = False,
    **engine: Any,
) -> None:
    """See `CompiledModel.export`. `engine`: what `kvpass.backends.tensorrt.write` takes beside all formats' options."""
    checked_options(path, format, guard, batch_size, capacity, for_tensorrt=for_tensorrt, engine=engine)
    longest = min(max_tokens or model._recipe.max_tokens, model._recipe.max_tokens)
    with new_target(path) as target:
        if guard == "in_graph":
            programs, phases = _guarded(model, batch_size, longest, capacity or longest, progress)
        else:
            programs, phases = _programs(model, "tensorrt" if for_tensorrt else format, batch_size, longest, progress)
        manifest = _manifest(model, format, guard, batch_size, phases)
        texts = {f"{TEXTS}/{name}.txt": program_text(program) for name, program in programs.items()}
        parsed = {"for_tensorrt": True} if for_tensorrt else {}
        _backend(format).write(programs, manifest, texts, target, progress, **parsed, **engine)


def checked_options(
    path: str | Path,
    format: str,
    guard: str,
    batch_size: int,
    capacity: int | None,
    *,
    for_tensorrt: bool,
    engine: Collection[str],
) -> None:
    """Raises `PackageError` for options that do not go together, and for a target that is there."""
    if format not in FORMATS:
        raise PackageError(f"there is no format {format!r}; known are {', '.join(FORMATS)}")
    if not isinstance(batch_size, int) or batch_size < 1:
        raise PackageError(f"batch_size is {batch_size!r}, expected a number of rows, at least 1")
    if guard not in GUARDS:
        raise PackageError(f"there is no guard {guard!r}; known are {', '.join(GUARDS)}")
    if guard == "in_graph" and format != "exported_program":
        raise PackageError("guard='in_graph' makes one program for other compilers; take format='exported_program'")
    if guard == "host" and capacity is not None:
        raise PackageError(f"capacity={capacity} is for guard='in_graph'; other programs take caches of any size")
    if engine and format != "tensorrt":
        raise PackageError(f"{', '.join(engine)}: for format='tensorrt' alone")
    if for_tensorrt and format != "onnx":
        raise PackageError(f"for_tensorrt=True: for format='onnx' alone, not {format!r}")
    if format == "aot_inductor" and Path(path).suffix != ".pt2":
        raise PackageError(f"{path}: an AOTInductor package is a file whose name ends in .pt2")
    if Path(path).exists():
        raise PackageError(f"{path} exists; give another path, or remove it first")


def report_for_tensorrt(model: CompiledModel, *, batch_size: int = 1, max_tokens: int | None = None) -> Any:
    """See `CompiledModel.report`: a `TensorRTReport`. Raises `PackageError` if TensorRT is not installed."""
    longest = min(max_tokens or REPORTED, model._recipe.max_tokens)
    recipe, layers = model._recipe, len(model._execution.layout.layers)
    programs, refused = {}, []
    for number, prompts in enumerate(prompts_of(recipe.press, recipe.budget, layers, longest)):
        name = f"prefill_{number + 1}" if number else "prefill"
        try:
            programs[name] = prefill_program(model, "tensorrt", prompts, batch_size, longest)
        except PressError as error:
            refused.append(f"{name}: {error}")
    for phase in (Phase.EXTEND, Phase.DECODE):
        programs[phase.value] = step_program(model, "tensorrt", phase, batch_size, longest)
    return importlib.import_module("kvpass.backends.tensorrt.report").report(programs, tuple(refused))


def is_exported(path: Path) -> bool:
    """Whether it is a package, as far as one can see without reading it."""
    text = path / MANIFEST
    return path.is_file() or (text.is_file() and f'"format": "{FORMAT}"' in text.read_text())


def load_exported(path: Path) -> DeployedModel:
    """A package that `export_model` wrote. Raises `PackageError` for anything else."""
    if path.is_file():
        manifest = _backend("aot_inductor").read_manifest(path)
    else:
        manifest = Manifest.from_json((path / MANIFEST).read_text(), str(path))
        check_files(path, manifest.files)
    device = torch.device(manifest.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise PackageError(f"{path} was exported for {device}, which is not here; export the model for this machine")
    runner = _backend(manifest.kind).Runner(path, manifest)
    return (DeployedModel if manifest.guard == "host" else GuardedModel)(manifest, runner)


def read_texts(path: str | Path) -> dict[str, str]:
    """The programs of a package, or of a file that `torch.export.save` wrote, as text by name.

    Raises `PackageError` for anything else.
    """
    source = Path(path)
    if not source.exists():
        raise PackageError(f"{source} does not exist")
    if source.is_file() and (texts := _stored_texts(source)):
        return texts
    if source.is_dir():
        if not is_exported(source):
            raise PackageError(f"{source} is no package that CompiledModel.export wrote")
        return _stored_texts(source)
    try:
        return {"program": program_text(torch.export.load(source))}
    except Exception as error:  # whatever torch finds wrong with a file
        raise PackageError(f"{source} is neither a package nor a program of torch.export: {error}") from error


def _stored_texts(path: Path) -> dict[str, str]:
    """The programs of a package as text, by name; none if it is no package."""
    if path.is_file():
        found = _backend("aot_inductor").read_texts(path)
    else:
        found = {str(text.relative_to(path)): text.read_text() for text in sorted((path / TEXTS).glob("*.txt"))}
    return {Path(name).stem: text for name, text in found.items() if name.startswith(f"{TEXTS}/")}


def _programs(
    model: CompiledModel, format: str, batch_size: int, longest: int, progress: Progress
) -> tuple[dict[str, ExportedProgram], list[PhaseSpec]]:
    """The phases by name."""
    programs: dict[str, ExportedProgram] = {}
    phases: list[PhaseSpec] = []
    recipe, layers = model._recipe, len(model._execution.layout.layers)
    for number, prompts in enumerate(prompts_of(recipe.press, recipe.budget, layers, longest)):
        name = f"prefill_{number + 1}" if number else "prefill"
        progress(f"exporting {name}")
        programs[name] = prefill_program(model, format, prompts, batch_size, longest)
        phases.append(phase_spec(name, Phase.PREFILL.value, prompts.ranges, programs[name]))
    for phase, ends in ((Phase.EXTEND, (2, longest)), (Phase.DECODE, (1, 1))):
        progress(f"exporting {phase.value}")
        programs[phase.value] = step_program(model, format, phase, batch_size, longest)
        phases.append(phase_spec(phase.value, phase.value, [ends], programs[phase.value]))
    return programs, phases


def prefill_program(
    model: CompiledModel, format: str, prompts: Prompts, batch_size: int, longest: int
) -> ExportedProgram:
    """The program that reads these prompts, as a format takes it."""
    layout, tensorrt = model._execution.layout, None
    if format == "tensorrt":
        press = press_text(model._recipe.press) if model._recipe.press else "no press"  # as the user wrote it
        tensorrt = LowerForTensorRT(longest, prompts.greatest(len(layout.layers)), press)
    steps = phase_passes(Phase.PREFILL, prompts.press, model._recipe.layers, functional=True, tensorrt=tensorrt)
    return export_prefill(_lowered(model, steps), layout, prompts, batch_size=batch_size)


def step_program(model: CompiledModel, format: str, phase: Phase, batch_size: int, longest: int) -> ExportedProgram:
    """The program that appends some tokens, or one, as a format takes it."""
    functional = format in FUNCTIONAL
    one_row = format == "aot_inductor" and batch_size == 1 and streams_memory("inductor", model.device)
    steps = phase_passes(
        phase,
        None,
        functional=functional,
        one_row=one_row and phase is Phase.DECODE,
        tensorrt=LowerForTensorRT(longest) if format == "tensorrt" else None,
    )
    layout = model._execution.layout
    return export_step(_lowered(model, steps), layout, batch_size=batch_size, longest=longest, functional=functional)


def _guarded(
    model: CompiledModel, batch_size: int, longest: int, capacity: int, progress: Progress
) -> tuple[dict[str, ExportedProgram], list[PhaseSpec]]:
    """One program with both branches."""
    recipe, layout = model._recipe, model._execution.layout
    prompts, *others = prompts_of(recipe.press, recipe.budget, len(layout.layers), longest)
    if others:
        raise PackageError(
            f"{recipe.press} has one graph for prompts of {prompts.ranges} tokens and others for longer ones, which do "
            "not fit into one program; export with guard='host', or with a smaller max_tokens="
        )
    sizes = prompts.press.sizes(Prompt(longest, recipe.budget, 0, len(layout.layers))) if prompts.press else {}
    if capacity < (kept := sizes.get("budget", longest)):
        raise PackageError(
            f"capacity={capacity}: {kept} are kept of {longest} tokens; give that much, and room for more"
        )
    progress("exporting")
    prefill = _lowered(model, phase_passes(Phase.PREFILL, prompts.press, recipe.layers, functional=True))
    extend = _lowered(model, phase_passes(Phase.EXTEND, None, functional=True))
    program = export_guarded(prefill, extend, layout, prompts, batch_size=batch_size, capacity=capacity)
    return {"model": program}, [phase_spec("model", "any", prompts.ranges, program)]


def _lowered(model: CompiledModel, steps: tuple[Pass, ...]) -> KVProgram:
    program, _ = model._execution.graphs.made(steps, model._recipe.print_ir)
    return program


def _manifest(model: CompiledModel, format: str, guard: str, batch_size: int, phases: list[PhaseSpec]) -> Manifest:
    recipe = model._recipe
    ends = model.generation_config.eos_token_id
    return Manifest(
        kind=format,
        guard=guard,
        press=press_text(recipe.press) if recipe.press else None,
        ratio=recipe.budget.ratio,
        target_size=recipe.budget.target_size,
        batch_size=batch_size,
        max_tokens=recipe.max_tokens,
        device="cuda" if format == "tensorrt" else str(model.device),
        eos_token_ids=() if ends is None else (ends,) if isinstance(ends, int) else tuple(ends),
        config=model.config.to_dict(),
        layers=tuple(
            LayerSpec(
                kv_heads=layer.heads,
                key_size=layer.key_size,
                value_size=layer.value_size,
                dtype=layer.dtype,
                pressed=layer.pressed,
                ring=layer.ring,
                reads=layer.reads,
            )
            for layer in model._execution.layout.layers
        ),
        phases=tuple(phases),
    )


def _backend(format: str) -> ModuleType:
    return importlib.import_module(f"kvpass.backends.{format}")
