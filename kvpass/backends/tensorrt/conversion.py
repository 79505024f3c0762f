"""From a program of torch.export to a network of TensorRT, and to an engine."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind
from torch.fx import GraphModule

from kvpass.backends.engine_sizes import Range, slot_range, token_range
from kvpass.backends.tensorrt.library import library
from kvpass.deployment.manifest import PhaseSpec, TensorSpec
from kvpass.errors import PackageError

WRITES = (OutputKind.USER_INPUT_MUTATION, OutputKind.BUFFER_MUTATION, OutputKind.PARAMETER_MUTATION)
LOG = "torch_tensorrt [TensorRT Conversion Context]"
# What TensorRT logs as errors though nothing is wrong: names that are taken, and that there is no GPU.
HARMLESS = ("Failed attempt to rename a layer", "Error Code 1: Cuda Runtime")


@dataclass(frozen=True)
class Extent:
    """The least, usual and greatest shape of an input."""

    least: tuple[int, ...]
    usual: tuple[int, ...]
    most: tuple[int, ...]
    names: tuple[str, ...]  # of its sizes; those that have one name are equal


Extents = Mapping[str, Extent]  # by the name of an input


def profile_of(
    phase: PhaseSpec, max_tokens: int, *, tokens: Range | None = None, slots: Range | None = None
) -> Extents:
    """The sizes of a phase's inputs: S new tokens and C slots of a layer, as given or as they may occur."""
    low, high = phase.tokens[0][0], phase.tokens[-1][1]
    new = token_range(phase.phase, low, high, tokens)
    held = slot_range(low, new, max_tokens, slots)

    def shape(port: TensorSpec, which: int) -> tuple[int, ...]:
        return tuple(s if isinstance(s, int) else (new if s == "S" else held)[which] for s in port.shape)

    return {
        port.name: Extent(shape(port, 0), shape(port, 1), shape(port, 2), tuple(map(str, port.shape)))
        for port in phase.inputs
    }


def output_names(phase: PhaseSpec) -> list[str]:
    """What outputs are called in an engine, where no input may have the same name."""
    taken = {port.name for port in phase.inputs}
    return [f"{port.name}_out" if port.name in taken else port.name for port in phase.outputs]


@dataclass
class Network:
    """A network of TensorRT with what made it."""

    interpreter: Any
    profile: Extents

    @property
    def definition(self) -> Any:
        """An `INetworkDefinition`."""
        return self.interpreter.ctx.net

    def build(self, targets: Sequence[str] = ()) -> bytes:
        """A serialized engine, for compute capabilities such as "SM89" or, without them, the flavour's default.

        Raises `PackageError` if TensorRT refuses the network or does not know a target.
        """
        trt = library().trt
        config = self.interpreter._populate_trt_builder_config()
        known = getattr(trt, "ComputeCapability", None)  # that for data-centre GPUs builds for the one that is there
        if unknown := [target for target in targets if not hasattr(known, target)]:
            raise PackageError(f"{library().flavour} {library().version} does not build for {', '.join(unknown)}")
        if targets:
            config.num_compute_capabilities = len(targets)
            for index, target in enumerate(targets):
                config.set_compute_capability(getattr(known, target), index)
        with _logged() as errors:
            plan = self.interpreter.builder.build_serialized_network(self.definition, config)
        if plan is None:
            raise PackageError(f"TensorRT did not build the network: {'; '.join(errors) or 'it does not say why'}")
        return bytes(plan)


def settings() -> Any:
    """How torch_tensorrt lowers and converts: exactly, and everything."""
    return (
        library()
        .part("dynamo._settings")
        .CompilationSettings(
            device=library().torch_tensorrt.Device(gpu_id=0),
            min_block_size=1,
            require_full_compilation=True,
            attn_bias_is_causal=False,  # else a mask may be taken for a causal one
            disable_tf32=True,
        )
    )


def lower(program: ExportedProgram) -> GraphModule:
    """The operators that are converted, as a graph that torch still runs; the program is used up.

    Raises `PackageError` if the program writes to its inputs or buffers: TensorRT would drop that without a word.
    """
    lowering, chosen = library().part("dynamo.lowering"), settings()
    program = lowering.pre_export_lowering(program, chosen)
    program = program.run_decompositions(
        lowering.get_decompositions(
            chosen.enable_experimental_decompositions, chosen.decompose_attention, chosen.use_fp32_acc
        )
    )
    for spec in program.graph_signature.output_specs:
        if spec.kind in WRITES:
            raise PackageError(f"the program writes to {spec.target}, which TensorRT would drop; export functions only")
    lowered: GraphModule = lowering.post_lowering(program.module(), chosen)
    return lowered


def unsupported(lowered: GraphModule) -> list[torch.fx.Node]:
    """The nodes that have no converter."""
    return [node for node, converter in converters_of(lowered).items() if converter is None]


def converters_of(lowered: GraphModule) -> dict[torch.fx.Node, str | None]:
    """For each operator the module whose converter takes it."""
    converters = library().part("dynamo.conversion._ConverterRegistry").DYNAMO_CONVERTERS
    converters.set_compilation_settings(settings())
    with _logged():  # it warns of what it does not take
        found = {node: converters.get(node) for node in lowered.graph.nodes if node.op == "call_function"}
    return {node: None if entry is None else str(entry[0].__module__) for node, entry in found.items()}


def convert(lowered: GraphModule, profile: Extents, outputs: Sequence[str]) -> Network:
    """The network of a lowered graph; sizes of its inputs may be as `profile` says, outputs are called so.

    Raises `PackageError` if a converter fails.
    """
    conversion, dtypes = (library().part(f"dynamo.conversion{part}") for part in ("", "._conversion"))
    inputs = []
    for node in lowered.graph.find_nodes(op="placeholder"):
        extent = profile[str(node.target)]
        shapes = {"min_shape": extent.least, "opt_shape": extent.usual, "max_shape": extent.most}
        if extent.least == extent.most:
            shapes = {"shape": extent.least}
        inputs.append(library().torch_tensorrt.Input(**shapes, dtype=node.meta["val"].dtype, name=str(node.target)))
    with _logged() as errors:
        interpreter = conversion.TRTInterpreter(
            lowered, inputs, output_dtypes=dtypes.infer_module_output_dtypes(lowered), compilation_settings=settings()
        )
        try:
            interpreter._construct_trt_network_def()
        except Exception as error:  # whatever a converter stumbles over; TensorRT logs the reason
            where = getattr(interpreter, "_cur_node", None)
            raise PackageError(f"{where} was not converted for TensorRT: {'; '.join(errors) or error}") from error
    definition = interpreter.ctx.net
    for index in range(definition.num_inputs):
        tensor = definition.get_input(index)
        for axis, name in enumerate(profile[tensor.name].names):
            if tensor.shape[axis] == -1:  # keys and values of a layer are equally long, which the builder must know
                tensor.set_dimension_name(axis, name)
    for index, name in enumerate(outputs):
        definition.get_output(index).name = name
    return Network(interpreter, profile)


@contextmanager
def _logged() -> Iterator[list[str]]:
    """What TensorRT logs as errors, instead of printing it."""
    errors: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            if record.levelno >= logging.ERROR and not any(part in text for part in HARMLESS):
                errors.append(text)

    handler, loggers = Collect(), [logging.getLogger(name) for name in (LOG, "torch_tensorrt")]
    before = [logger.propagate for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.propagate = False
    try:
        yield errors
    finally:
        for logger, propagated in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.propagate = propagated
