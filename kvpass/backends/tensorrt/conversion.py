"""From a program of torch.export to a network of TensorRT, and to an engine."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind
from torch.fx import GraphModule

from kvpass.backends.tensorrt.library import library
from kvpass.deployment.manifest import PhaseSpec, TensorSpec
from kvpass.errors import PackageError

WRITES = (OutputKind.USER_INPUT_MUTATION, OutputKind.BUFFER_MUTATION, OutputKind.PARAMETER_MUTATION)


@dataclass(frozen=True)
class Extent:
    """The least, usual and greatest shape of an input."""

    least: tuple[int, ...]
    usual: tuple[int, ...]
    most: tuple[int, ...]
    names: tuple[str, ...] = ()  # of its sizes; those that have one name are equal

    @property
    def constant(self) -> bool:
        return self.least == self.most


Profile = Mapping[str, Extent]  # by the name of an input
Range = tuple[int, int, int]  # least, usual and greatest value of a size


def profile_of(
    phase: PhaseSpec, max_tokens: int, *, tokens: Range | None = None, slots: Range | None = None
) -> Profile:
    """The sizes of a phase's inputs: S new tokens and C slots of a layer, as given or as they may occur.

    The usual ones are what an engine is tuned for: prompts of 1024 tokens, questions of 64, caches of 2048 slots.
    """
    low, high = phase.tokens[0][0], phase.tokens[-1][1]
    new = tokens or (low, max(low, min(1024 if phase.phase == "prefill" else 64, high)), high)
    held = slots or (high if high == 1 else low, min(2048, max_tokens), max_tokens)
    held = tuple(max(pair) for pair in zip(held, new, strict=True))  # type: ignore[assignment]  # new ones fit in

    def shape(port: TensorSpec, which: int) -> tuple[int, ...]:
        return tuple(s if isinstance(s, int) else (new if s == "S" else held)[which] for s in port.shape)

    return {
        port.name: Extent(*(shape(port, which) for which in range(3)), tuple(map(str, port.shape)))
        for port in phase.inputs
    }


@dataclass
class Network:
    """A network of TensorRT with what made it."""

    interpreter: Any

    @property
    def definition(self) -> Any:
        """An `INetworkDefinition`."""
        return self.interpreter.ctx.net

    def build(self, targets: Sequence[str] = ()) -> bytes:
        """A serialized engine, for compute capabilities such as "SM89" or, without them, the flavour's default.

        Raises `PackageError` if TensorRT refuses the network.
        """
        trt = library().trt
        config = self.interpreter._populate_trt_builder_config()
        if targets:
            config.num_compute_capabilities = len(targets)
            for index, target in enumerate(targets):
                config.set_compute_capability(getattr(trt.ComputeCapability, target), index)
        plan = self.interpreter.builder.build_serialized_network(self.definition, config)
        if plan is None:
            raise PackageError("TensorRT did not build the network; what it logged just before says why")
        return bytes(plan)


def settings() -> Any:
    """How torch_tensorrt lowers and converts: exactly, and everything."""
    module = library().part("dynamo._settings")
    return module.CompilationSettings(
        device=library().torch_tensorrt.Device(gpu_id=0),
        min_block_size=1,
        require_full_compilation=True,
        attn_bias_is_causal=False,  # else a mask may be taken for a causal one
        disable_tf32=True,
    )


def lower(program: ExportedProgram) -> GraphModule:
    """The operators that are converted, as a graph that torch still runs.

    Raises `PackageError` if the program writes to its inputs or buffers: TensorRT would drop that without a word.
    """
    lowering = library().part("dynamo.lowering")
    chosen = settings()
    functional = program.run_decompositions({})
    for spec in functional.graph_signature.output_specs:
        if spec.kind in WRITES:
            raise PackageError(f"the program writes to {spec.target}, which TensorRT would drop; export functions only")
    program = lowering.pre_export_lowering(functional, chosen)
    program = program.run_decompositions(
        lowering.get_decompositions(
            chosen.enable_experimental_decompositions, chosen.decompose_attention, chosen.use_fp32_acc
        )
    )
    lowered: GraphModule = lowering.post_lowering(program.module(), chosen)
    return lowered


def unsupported(lowered: GraphModule) -> list[torch.fx.Node]:
    """The nodes that have no converter."""
    converters = library().part("dynamo.conversion._ConverterRegistry").DYNAMO_CONVERTERS
    converters.set_compilation_settings(settings())
    return [node for node in lowered.graph.nodes if node.op == "call_function" and converters.get(node) is None]


def convert(lowered: GraphModule, profile: Profile) -> Network:
    """The network of a lowered graph; sizes of its inputs may be as `profile` says."""
    conversion = library().part("dynamo.conversion")
    dtypes = library().part("dynamo.conversion._conversion")
    inputs = []
    for node in lowered.graph.find_nodes(op="placeholder"):
        extent, dtype = profile[str(node.target)], node.meta["val"].dtype
        shapes = (
            {"shape": extent.least}
            if extent.constant
            else {"min_shape": extent.least, "opt_shape": extent.usual, "max_shape": extent.most}
        )
        inputs.append(library().torch_tensorrt.Input(**shapes, dtype=dtype, name=str(node.target)))
    interpreter = conversion.TRTInterpreter(
        lowered, inputs, output_dtypes=dtypes.infer_module_output_dtypes(lowered), compilation_settings=settings()
    )
    interpreter._construct_trt_network_def()
    network = Network(interpreter)
    for index in range(network.definition.num_inputs):
        tensor = network.definition.get_input(index)
        for axis, name in enumerate(profile[tensor.name].names):
            if tensor.shape[axis] == -1:  # keys and values of a layer are equally long, which the builder must know
                tensor.set_dimension_name(axis, name)
    return network
