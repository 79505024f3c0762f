"""torch.export, and the way from an ExportedProgram to a KVProgram."""

import inspect
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch._dynamo.exc import UserError
from torch.export import Dim, ExportedProgram
from torch.fx import Graph, GraphModule, Node

from kvpass.capture.functional_form import as_function, functional
from kvpass.capture.interface import OURS, Interface
from kvpass.capture.set_order import sets_in_order
from kvpass.errors import UnsupportedModelError
from kvpass.ir.form import Form
from kvpass.ir.holder import holder
from kvpass.ir.program import KVProgram, Port, Role
from kvpass.ir.propagate import assign_values
from kvpass.ir.rename import plain_name
from kvpass.ir.symbols import SymbolicShapes

# Sizes of the example. A dynamic size of 1 would be frozen, and equal sizes could be taken for one another.
EXAMPLE_BATCH, EXAMPLE_LENGTH = 2, 24


class _Signature(nn.Module):
    """Gives every model the signature (input_ids, position_ids) -> logits.

    A forward without `position_ids` is called with the token ids alone; `find-positions` then finds its own.
    """

    def __init__(self, model: nn.Module, fixed: Mapping[str, object]) -> None:
        super().__init__()
        self.model = model
        self.fixed = dict(fixed)
        names = list(inspect.signature(model.forward).parameters)
        self.ids_name = "input_ids" if "input_ids" in names else names[0]
        self.takes_positions = "position_ids" in names

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        given = {self.ids_name: input_ids, **self.fixed}
        if self.takes_positions:
            given["position_ids"] = position_ids
        result = self.model(**given)
        if isinstance(result, tuple):
            result = result[0]
        return result if isinstance(result, Tensor) else result.logits


def export_model(model: nn.Module, fixed: Mapping[str, object], max_tokens: int) -> ExportedProgram:
    """Export `model` with dynamic batch and length, in functional form with attention and linear whole.

    `fixed` holds keyword arguments of its forward that stay constant, `max_tokens` is its longest text.
    """
    device = next(model.parameters()).device
    ids = torch.zeros(EXAMPLE_BATCH, EXAMPLE_LENGTH, dtype=torch.int64, device=device)
    positions = torch.arange(EXAMPLE_LENGTH, device=device).repeat(EXAMPLE_BATCH, 1)
    sizes = {
        0: Dim("batch", min=1, max=2**16),
        1: Dim("tokens", min=2, max=max(max_tokens, EXAMPLE_LENGTH + 1)),
    }
    # Under no_grad, because RoPE modules are decorated with it and would hide in a sub-graph otherwise.
    with torch.no_grad(), torch.fx.traceback.preserve_node_meta(), sets_in_order(model), warnings.catch_warnings():
        # torch 2.13's own export uses a class that it deprecates; nobody who reads it could do anything about it.
        warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*", category=FutureWarning)
        call, given = _Signature(model, fixed), (ids, positions)
        try:
            exported = torch.export.export(call, given, dynamic_shapes=(sizes, sizes), strict=False)
        except UserError as error:
            if "Constraints violated" not in str(error) or f"!= {max_tokens}." in str(error):
                raise
            # Guards that torch cannot see to be always true become checks, which specialize-phase settles.
            exported = torch.export.export(
                call,
                given,
                dynamic_shapes=(sizes, sizes),
                strict=False,
                prefer_deferred_runtime_asserts_over_guards=True,
            )
        return functional(exported)


def program_from_export(exported: ExportedProgram, interface: Interface = OURS) -> KVProgram:
    """A KVProgram over the parameters of `exported`; nodes are renamed by operator and order of appearance.

    `interface` says what its inputs and outputs are.
    """
    signature = exported.graph_signature
    mutated = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
    if mutated:
        raise UnsupportedModelError(
            f"the model writes its own state in forward ({', '.join(mutated)}); a compiled graph would lose it"
        )
    attributes = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    attributes |= signature.inputs_to_lifted_tensor_constants
    tensors = {**exported.state_dict, **exported.constants}

    graph = Graph()
    placed: dict[Node, Node] = {}
    live: dict[str, Tensor] = {}
    parameters = [n for n in exported.graph.nodes if n.op == "placeholder" and n.name in attributes]
    ids, positions = (graph.placeholder(role.value) for role in (Role.INPUT_IDS, Role.POSITION_IDS))
    for node in parameters:
        if not node.users:  # the dead twin of a tied weight
            continue
        name = attributes[node.name]
        target = name.removeprefix("model.")  # the atom that _Signature added
        live[target] = tensors[name]
        placed[node] = graph.create_node("get_attr", target)
    known = {interface.ids: ids, interface.positions: positions}
    for node in exported.graph.nodes:
        if node.op == "placeholder" and node.name not in attributes and node.users:
            placed[node] = known.get(node.name) or _all_ones(graph, ids, node.meta["val"].dtype)
    for node in exported.graph.nodes:
        if node.op == "call_function":
            target, given, named = as_function(node) or (node.target, node.args, node.kwargs)
            args, kwargs = torch.fx.node.map_arg((given, named), placed.__getitem__)
            placed[node] = graph.create_node("call_function", target, args, kwargs)
            placed[node]._rename(plain_name(placed[node]))
            placed[node].meta = dict(node.meta)
        elif node.op not in ("placeholder", "output"):
            raise UnsupportedModelError(
                f"node {node.name}: the export holds a {node.op!r}; only operator calls are understood"
            )
    (returned,) = exported.graph.output_node().args
    graph.output((placed[returned[interface.logits]],))
    graph.eliminate_dead_code()

    inputs = tuple(Port(str(n.target), Role(str(n.target))) for n in graph.nodes if n.op == "placeholder")
    program = KVProgram(
        graph_module=GraphModule(holder(live), graph),
        form=Form.CAPTURED,
        inputs=inputs,
        outputs=(Port("logits", Role.LOGITS),),
        shapes=SymbolicShapes(),
    )
    device = next(iter(live.values())).device
    shape = (program.shapes.dim("B", EXAMPLE_BATCH + 1), program.shapes.dim("S", EXAMPLE_LENGTH + 5))
    assign_values(program, {p.name: program.shapes.empty(shape, torch.int64, device) for p in inputs})
    return program


def _all_ones(graph: Graph, ids: Node, dtype: torch.dtype) -> Node:
    """A padding mask [B, S] where there is no padding."""
    size = torch.ops.aten.sym_size.int
    sizes = [graph.call_function(size, (ids, axis)) for axis in range(2)]
    return graph.call_function(torch.ops.aten.ones.default, (sizes,), {"dtype": dtype})
