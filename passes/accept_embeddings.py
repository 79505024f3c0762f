"""Let embeddings come from outside, for what no token id stands for: the patches of an image, a soft prompt."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from kvpass.errors import UnsupportedModelError
from kvpass.ir.attention_site import attention_sites
from kvpass.ir.builder import GraphBuilder
from kvpass.ir.form import Form
from kvpass.ir.program import KVProgram, Port, Role
from kvpass.ir.subgraph import reached_from
from kvpass.pass_manager import Pass

aten = torch.ops.aten
REPEATS = (aten.unsqueeze.default, aten.expand.default)


@dataclass(frozen=True)
class AcceptEmbeddings(Pass):
    """Replace what the embedding module returns by `inputs_embeds`, and positions on several axes by an input.

    before:  embedding: f32[B, S, 64] = embedding(model.embed_tokens.weight, input_ids)
             expand: i64[3, B, S] = expand(unsqueeze(position_ids, 0), [3, B, -1])
    after:   input inputs_embeds: f32[B, S, 64]                  # instead of input_ids
             input position_axes: i64[3, B, S]                   # where the model has such axes

    The embedding module may scale what it looks up (Gemma 3); `inputs_embeds` are as it returns them, which is what
    `model.get_input_embeddings()` makes of ids. It runs behind all that reads the ids or the positions.
    """

    name: ClassVar[str] = "accept-embeddings"
    requires: ClassVar[Form] = Form.LOWERED
    produces: ClassVar[Form] = Form.LOWERED

    def run(self, program: KVProgram) -> int:
        if not any(port.role is Role.INPUT_IDS for port in program.inputs):
            return 0
        builder = GraphBuilder(program, self.name)
        ids = program.input_node(Role.INPUT_IDS)
        embedded = _embedded(program, ids)
        given = builder.placeholder(Port(Role.EMBEDDINGS.value, Role.EMBEDDINGS), embedded.meta["val"])
        embedded.replace_all_uses_with(given)
        for size in [user for user in ids.users if user.target is aten.sym_size.int]:
            size.replace_input_with(ids, given)
        axes = _position_axes(program)
        if axes:
            places = builder.placeholder(Port(Role.POSITION_AXES.value, Role.POSITION_AXES), axes[0].meta["val"])
            for node in axes:
                node.replace_all_uses_with(places)
        program.graph.eliminate_dead_code()  # writes to the cache are kept
        if ids.users:
            raise _read_elsewhere(ids.users)
        program.inputs = tuple(port for port in program.inputs if port.role is not Role.INPUT_IDS)
        program.graph.erase_node(ids)
        return 1 + len(axes)


def _embedded(program: KVProgram, ids: Node) -> Node:
    """What the embedding module returns for the ids; a model may replace some of them first."""
    reached = reached_from([ids], program.graph.nodes)
    lookups = [n for n in reached if n.target is aten.embedding.default and n.args[1] in reached]
    if len(lookups) != 1:
        raise _read_elsewhere(lookups)
    (node,) = lookups
    around = {path for site in attention_sites(program) for path in _modules_of(site.node)}
    module = _modules_of(node)[-1:]
    while not around.issuperset(module) and len(node.users) == 1 and _modules_of(next(iter(node.users)))[-1:] == module:
        (node,) = node.users
    return node


def _read_elsewhere(readers: Iterable[Node]) -> UnsupportedModelError:
    names = ", ".join(sorted(node.name for node in readers))
    return UnsupportedModelError(
        f"inputs_embeds cannot stand for input_ids: this model reads the ids in other places than one table of "
        f"embeddings ({names}); give input_ids"
    )


def _modules_of(node: Node) -> list[str]:
    """The paths of the modules that a node was traced in, the innermost last."""
    return [str(path) for path, _ in node.meta.get("nn_module_stack", {}).values()]


def _position_axes(program: KVProgram) -> list[Node]:
    """Where the positions [B, S] are repeated to [axes, B, S], one for time, height and width each."""
    found = []
    for node in program.graph.nodes:
        value, source = node.meta.get("val"), node
        if node.target is not aten.expand.default or not isinstance(value, Tensor) or value.dim() != 3:
            continue
        while source.target in REPEATS:
            source = source.args[0]
        axes, batch, tokens = (program.shapes.text(size) for size in value.shape)
        same = [axes, batch, tokens] == [axes, *(program.shapes.text(n) for n in source.meta["val"].shape)]
        if source is program.input_node(Role.POSITION_IDS) and same and axes.isdigit() and int(axes) > 1:
            found.append(node)
    return found
