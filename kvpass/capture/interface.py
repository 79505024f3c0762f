"""What is what among the inputs and outputs of an ExportedProgram."""

from dataclasses import dataclass
from typing import cast

import torch
from torch import SymInt, Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from kvpass.errors import UnsupportedModelError

WITHOUT_BOUND = 2**20  # tokens, where an export names no longest text


@dataclass(frozen=True)
class Interface:
    """Names of the inputs of an export, and which of its outputs the logits are."""

    ids: str
    positions: str | None  # None: it counts them itself
    masks: tuple[str, ...] = ()  # padding masks: all ones here, padding never reaches a graph
    logits: int = 0
    max_tokens: int = WITHOUT_BOUND


OURS = Interface("input_ids", "position_ids")


def interface_of(exported: ExportedProgram) -> Interface:
    """How to read the export of somebody else: token ids i64[B, S], perhaps positions and a padding mask.

    Raises `UnsupportedModelError` if an input is something else, or if batch or length are no dynamic sizes.
    """
    names = exported.graph_signature.user_inputs
    given = [node for node in exported.graph.nodes if node.op == "placeholder" and node.name in names and node.users]
    used = {node.name: node.meta["val"] for node in given if isinstance(node.meta["val"], Tensor)}
    whole = {name: value for name, value in used.items() if value.dim() == 2 and not value.is_floating_point()}
    positions = [name for name in whole if "position" in name]
    masks = tuple(name for name in whole if "mask" in name)
    ids = [name for name in whole if name not in positions and name not in masks]
    if len(ids) != 1 or len(positions) > 1 or set(used) != set(whole):
        found = ", ".join(f"{name}: {value.dtype} {tuple(value.shape)}" for name, value in used.items())
        raise UnsupportedModelError(
            f"the exported program reads ({found}); expected token ids [B, S] and, if it likes, position_ids [B, S] "
            "and attention_mask [B, S]"
        )
    sizes = used[ids[0]].shape
    for axis, (name, size) in enumerate(zip(("batch", "length"), sizes, strict=True)):
        if not isinstance(size, SymInt):
            raise UnsupportedModelError(
                f"the exported program has a fixed {name} of {size} tokens or rows; export it with "
                f"dynamic_shapes={{'{ids[0]}': {{0: Dim('batch'), 1: Dim('tokens')}}, ...}}, axis {axis} is constant"
            )
    for name in positions:
        if str(used[name].shape) != str(sizes):
            raise UnsupportedModelError(f"{name} is {tuple(used[name].shape)}, expected [B, S] = {tuple(sizes)}")
    logits = _logits(exported.graph.output_node(), sizes)
    longest = _longest(exported, cast(SymInt, sizes[1]))
    return Interface(ids[0], positions[0] if positions else None, masks, logits, longest)


def _logits(output: Node, sizes: torch.Size) -> int:
    """The first output [B, S, V] of floats."""
    returned = output.args[0]
    assert isinstance(returned, tuple | list)
    for index, node in enumerate(returned):
        value = node.meta.get("val") if isinstance(node, Node) else None
        if isinstance(value, Tensor) and value.is_floating_point() and str(value.shape[:2]) == str(sizes):
            return index
    raise UnsupportedModelError("the exported program returns no logits [B, S, V]")


def _longest(exported: ExportedProgram, tokens: SymInt) -> int:
    """The upper end of the length's range."""
    bound = exported.range_constraints[tokens.node.expr].upper
    return min(int(bound), WITHOUT_BOUND) if bound.is_finite else WITHOUT_BOUND
