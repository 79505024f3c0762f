"""A program of torch.export as an ONNX model."""

import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as passes
import torch
from onnxscript.optimizer import fold_constants_ir
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind
from torch.fx import Node
from torch.utils import _pytree as pytree

from kvpass.backends.onnx.names import IN_PLACE, STATE
from kvpass.backends.onnx.operators import TRANSLATIONS
from kvpass.errors import PackageError, VerificationError

OPSET = 20
# What ONNX Runtime may do without a copy, or leave out: a reader of the result reads the value itself.
VIEWS = ["Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Expand", "Cast", "Slice", "Tile", "Transpose"]
_of_layer = re.compile(r"(keys|values|positions|kept)_(\d+)(_out)?")


def converted(phase: str, program: ExportedProgram, *, for_tensorrt: bool = False) -> ir.Model:
    """The model, its weights still torch's. Raises `PackageError` for what ONNX, or ONNX Runtime's CPU, cannot do.

    for_tensorrt: whether TensorRT's parser reads it, which takes bfloat16, too.
    """
    _check(phase, program, for_tensorrt)
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)  # no torchvision
    try:
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            custom_translation_table=TRANSLATIONS,
            optimize=False,
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        raise PackageError(_reason(phase, program, error)) from error
    assert exported is not None
    model: ir.Model = exported.model
    _name_outputs(model, _output_names(program))
    kinds = [(value.type, value.shape) for value in model.graph.outputs]
    _simplify(model)
    for value, (type_, shape) in zip(model.graph.outputs, kinds, strict=True):
        value.type, value.shape = type_, shape  # an equal value, which has none, may have taken its place
    _name_sizes(model)
    model.metadata_props[IN_PLACE] = " ".join(_in_place(model))
    return model


def _check(phase: str, program: ExportedProgram, for_tensorrt: bool) -> None:
    kinds = {spec.kind for spec in program.graph_signature.output_specs}
    if kinds != {OutputKind.USER_OUTPUT}:
        raise VerificationError(f"{phase} writes to its inputs, which ONNX cannot say; export it with functional=True")
    tensors = [*program.state_dict.items(), *program.constants.items()]
    found = [name for name, value in tensors if getattr(value, "dtype", None) is torch.bfloat16]
    if found and not for_tensorrt:
        reason = f"{found[0]} is bfloat16, for which ONNX Runtime has no CPU kernels"
        raise PackageError(f"{reason}; export model.float(), or for_tensorrt=True")


def _reason(phase: str, program: ExportedProgram, error: Exception) -> str:
    causes = list(_causes(error))
    found = re.search(r"target=torch\.ops\.([\w.]+)", "\n".join(map(str, causes)))
    if found is None:
        return f"{phase} cannot be written as ONNX: {causes[-1]}"
    return (
        f"{phase}: {found[1]}{_where(program, found[1])} has no form in ONNX; export another press, or save() the model"
    )


def _where(program: ExportedProgram, operator: str) -> str:
    """The first layer whose cache follows from such a node."""
    stem = operator.split(".")[1].strip("_").removesuffix("_ex")  # of what torch may have made of another one
    node = next((node for node in program.graph.nodes if stem in str(node.target)), None)
    reached: dict[Node, None] = {} if node is None else {node: None}
    for each in (stack := list(reached)):  # grows
        new = [user for user in each.users if user not in reached]
        reached |= dict.fromkeys(new)
        stack += new
    returned = program.graph.output_node().args[0]
    layers = [
        int(layer[2])
        for index, name in _output_names(program).items()
        if returned[index] in reached and (layer := _of_layer.fullmatch(name))
    ]
    return f" in layer {min(layers)}" if layers else ""


def _output_names(program: ExportedProgram) -> dict[int, str]:
    count = len(program.graph_signature.user_outputs)
    places: dict[str, int] = pytree.tree_unflatten(list(range(count)), program.call_spec.out_spec)
    return {index: name for name, index in places.items()}


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _name_outputs(model: ir.Model, names: Mapping[int, str]) -> None:
    """A value may leave under two names, or be an input: each output becomes one of its own."""
    inputs = {value.name for value in model.graph.inputs}
    for index, value in enumerate(model.graph.outputs):
        name = f"{names[index]}{STATE}" if names[index] in inputs else names[index]
        named = ir.Value(name=name, shape=value.shape, type=value.type)
        model.graph.append(ir.Node("", "Identity", [value], outputs=[named]))
        model.graph.outputs[index] = named


def _name_sizes(model: ir.Model) -> None:
    """S new tokens, C_0 slots of the cache of layer 0, N_0 kept ones; shapes inside have torch's names and go."""
    tokens: dict[str, str] = {}
    for value in (*model.graph.inputs, *model.graph.outputs):
        layer = _of_layer.fullmatch(str(value.name))
        sizes: list[Any] = list(value.shape)
        for axis, size in enumerate(sizes):
            if isinstance(size, int):
                continue
            if value.name == "input_ids":
                tokens[str(size)] = "S"
            letter = "C" if value.is_graph_input() or str(value.name).endswith(STATE) else "N"
            sizes[axis] = tokens.get(str(size)) or (f"{letter}_{layer[2]}" if layer else None)
        value.shape = ir.Shape(sizes)
    for node in model.graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = value.type = None


def _simplify(model: ir.Model) -> None:
    """What onnxscript's optimizer does, but for its rewriting: that takes x + 1e-8 for x."""
    passes.InlinePass()(model)
    for _ in range(2):
        fold_constants_ir(model, onnx_shape_inference=False, input_size_limit=1024, output_size_limit=1024)
        passes.RemoveUnusedNodesPass()(model)
    for simplify in (
        passes.RemoveUnusedFunctionsPass(),
        passes.RemoveUnusedOpsetsPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.LiftSubgraphInitializersToMainGraphPass(),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.OutputFixPass(),
        passes.NameFixPass(),
        passes.ClearMetadataAndDocStringPass(),
    ):
        simplify(model)


def _in_place(model: ir.Model) -> Iterator[str]:
    """State whose new value may be written over the old: everything that reads the old comes before the write."""
    inputs = {value.name: value for value in model.graph.inputs}
    for output in model.graph.outputs:
        old, writer = inputs.get(str(output.name).removesuffix(STATE)), output.producer()
        if old is None or writer is None:
            continue
        before = _ancestors(writer)
        # A ScatterND that finds its first input where its output goes copies nothing.
        if all(
            node.op_type == "ScatterND" and index == 0 if node is writer else node in before
            for node, index in _readers(old)
        ):
            yield str(old.name)


def _readers(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    for node, index in value.uses():
        if node.op_type in VIEWS and index == 0:
            yield from _readers(node.outputs[0])
        elif node.op_type != "Shape":
            yield node, index


def _ancestors(node: ir.Node) -> set[ir.Node]:
    found: set[ir.Node] = set()
    stack = [node]
    while stack:
        for value in stack.pop().inputs:
            producer = None if value is None else value.producer()
            if producer is not None and producer not in found:
                found.add(producer)
                stack.append(producer)
    return found
