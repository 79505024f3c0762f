"""What a mask in a graph lets tokens see, found by computing it."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.fx import Node

from kvpass.errors import UnsupportedModelError
from kvpass.ir.program import KVProgram, Role
from kvpass.ir.subgraph import Subgraph

LENGTHS = (48, 61)  # at which a mask is evaluated; longer ones are added for windows that would not bite
LONGEST = 2**15


def evaluations(program: KVProgram, mask: Node, where: str) -> Iterator[Tensor]:
    """The mask as bool[S, S] at several lengths, one of them beyond every number that occurs in its computation."""
    compute = Subgraph((), (mask,))
    ids, positions = program.input_node(Role.INPUT_IDS), program.input_node(Role.POSITION_IDS)
    if ids in compute.leaves():
        raise UnsupportedModelError(f"{where}: its mask {mask.name} depends on the tokens")
    numbers = {a for n in compute.body for a in n.args if isinstance(a, int) and a >= LENGTHS[0]}
    constants = {number for number in numbers if number < program.max_tokens}  # others never matter
    if too_long := {number for number in constants if number > LONGEST}:
        raise UnsupportedModelError(
            f"{where}: its mask {mask.name} holds {sorted(too_long)}, perhaps a window; masks are evaluated up to "
            f"{LONGEST} tokens. If your texts are shorter, say so with max_tokens={min(too_long)}"
        )
    rows = [_rows(n) for n in compute.body if n.target is torch.ops.aten.index_select.default]
    longest = min([*rows, program.max_tokens])  # of the tables that the mask is looked up in
    for length in {min(n, longest) for n in (*LENGTHS, *(constant + 13 for constant in constants))}:
        given = {n: program.attribute(n) for n in compute.leaves() if n.op == "get_attr"}
        given[positions] = torch.arange(length, device=positions.meta["val"].device)[None]
        (value,) = compute.run(given, program.shapes.bind(B=1, S=length))
        allowed = value if value.dtype == torch.bool else value > -1.0
        yield allowed.expand(1, allowed.shape[1] if allowed.dim() == 4 else 1, length, length)[0]


def _rows(lookup: Node) -> int:
    table, axis = lookup.args[:2]
    assert isinstance(table, Node) and isinstance(axis, int)
    return int(table.meta["val"].shape[axis])
