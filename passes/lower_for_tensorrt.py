"""Write what TensorRT has no form for as what it has."""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from kvpass.errors import PressError, VerificationError
from kvpass.ir import tensorrt_code as code
from kvpass.ir.builder import GraphBuilder
from kvpass.ir.form import Form
from kvpass.ir.program import KVProgram, Role, layer_of
from kvpass.ir.subgraph import Subgraph, argument
from kvpass.pass_manager import Pass

aten = torch.ops.aten
Written = tuple[Callable[..., Tensor], Sequence[Node]]  # tensor code, and the nodes that it reads


@dataclass(frozen=True)
class LowerForTensorRT(Pass):
    """Selections with a constant number, gathers and scatters as rows of tables, no std of a length, no sort.

    before:  topk_0: f32[B, 2, N] = topk(scores_0, N)[0]
    after:   top_0: f32[B, 2, N] = topk(cat([scores_0, -inf]), 150)[0][..., :N]          # prompts of up to 300 tokens

    TensorRT drops a write to an input without a word, so a graph that has one is refused; so is one with a loop or a
    Cholesky factor, which it has no form for.
    """

    name: ClassVar[str] = "lower-for-tensorrt"
    requires: ClassVar[Form] = Form.LOWERED
    produces: ClassVar[Form] = Form.LOWERED

    longest: int  # prompt
    most: tuple[tuple[str, int], ...] = ()  # the greatest value of each size that the press counts, by its name
    press: str = "no press"  # for messages

    def run(self, program: KVProgram) -> int:
        _refuse_writes(program)
        if missing := without_form(program):
            node, what = missing[0]
            raise PressError(
                f"{self.press}: layer {layer_of(node)}: TensorRT has no {what} ({node.name} = {node.target}); take "
                "another press, or another format, which runs it as it is"
            )
        builder, matches = GraphBuilder(program, self.name), 0
        for node in reversed(program.graph.nodes):  # the last of those that make a number first: it is the table
            if node.target in BITWISE and node.users and self._tabulate(builder, node):
                matches += 1
                program.drop_dead()
        for node in tuple(program.graph.nodes):
            if node.target is aten.topk.default:
                matches += self._select(builder, node)
            elif (rule := RULES.get(node.target)) is not None and (written := rule(node)) is not None:
                function, inputs = written
                _replace(builder, node, function, inputs)
                matches += 1
        program.drop_dead()
        return matches

    def _select(self, builder: GraphBuilder, node: Node) -> int:
        """A constant number of candidates, of which as many as wanted are used."""
        values, count = node.args[:2]
        assert isinstance(values, Node)
        rank = values.meta["val"].dim()
        axis, largest = argument(node, "dim"), argument(node, "largest")
        if not isinstance(count, Node):
            return 0
        most = self._most(builder.program, count)
        if axis not in (-1, rank - 1) or not largest or most is None:
            return 0
        source, size_axis = count.args
        assert isinstance(source, Node) and isinstance(size_axis, int)

        def selected(values: Tensor, sized: Tensor) -> tuple[Tensor, ...]:
            first = torch.arange(sized.shape[size_axis], device=values.device)  # a slice would compare it with `most`
            return tuple(part.index_select(-1, first) for part in code.top(values, most))

        parts = builder.inline(selected, [values, source], names=["top", "top_index"], layer=layer_of(node), like=node)
        for user in tuple(node.users):
            user.replace_all_uses_with(parts[user.args[1]])  # type: ignore[index]
            builder.program.graph.erase_node(user)
        builder.program.graph.erase_node(node)
        return 1

    def _most(self, program: KVProgram, count: Node) -> int | None:
        """The greatest value of a size that the press counts."""
        keys = {port.name: port.key for port in program.inputs if port.role is Role.SIZE}
        source = count.args[0] if count.target is aten.sym_size.int else None
        return dict(self.most).get(keys.get(str(source.target), "")) if isinstance(source, Node) else None

    def _tabulate(self, builder: GraphBuilder, node: Node) -> bool:
        """Whole numbers that depend on the place of a token alone, counted beforehand for the longest prompt."""
        program, subgraph = builder.program, Subgraph((), (node,))
        value, tokens = node.meta["val"], program.shapes["S"]
        axes = [i for i, size in enumerate(value.shape) if program.shapes.text(size) == "S"]
        if subgraph.leaves() or len(axes) != 1 or isinstance(tokens, int):
            return False
        (axis,) = axes

        def counted(length: int) -> Tensor:
            return subgraph.run({}, program.shapes.bind(S=length))[0]

        table = counted(self.longest)
        if any(not torch.equal(counted(n), table.narrow(axis, 0, n)) for n in (3, self.longest - 1)):
            return False
        tokens_read = program.token_node()
        constant = builder.constant(f"counted_{node.name}", table, layer_of(node))
        _replace(builder, node, lambda table, ids: table.narrow(axis, 0, ids.shape[1]), [constant, tokens_read])
        return True


def without_form(program: KVProgram) -> list[tuple[Node, str]]:
    """The nodes that TensorRT cannot take in any form, and what they are."""
    named = [(node, getattr(node.target, "__name__", "").split(".")[0]) for node in program.graph.nodes]
    return [(node, NO_FORM[name]) for node, name in named if name in NO_FORM]


def _replace(builder: GraphBuilder, node: Node, function: Callable[..., Tensor], inputs: Sequence[Node]) -> None:
    name = str(node.target).split(".")[1].strip("_")
    (new,) = builder.inline(function, inputs, names=[f"{name}_exact"], layer=layer_of(node), like=node)
    if isinstance(node.meta["val"], Tensor):
        node.replace_all_uses_with(new)
    for first in tuple(node.users):  # of the outputs of which only the first is read
        first.replace_all_uses_with(new)
        builder.program.graph.erase_node(first)
    builder.program.graph.erase_node(node)


def _refuse_writes(program: KVProgram) -> None:
    for node in program.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            raise VerificationError(
                f"{node.name} = {node.target} writes to {node.args[0]}, which TensorRT would drop; lower for it behind "
                "passes that leave functions (phase_passes(functional=True))"
            )


def _axis(node: Node, name: str = "dim") -> int:
    """The axis that an operator works along, from the front."""
    axis, source = argument(node, name), node.args[0]
    assert isinstance(axis, int) and isinstance(source, Node)
    return axis % int(source.meta["val"].dim())


def _gather(node: Node) -> Written:
    states, index, axis = node.args[0], node.args[2], _axis(node)
    assert isinstance(states, Node) and isinstance(index, Node)
    rank = states.meta["val"].dim()
    narrow = index.args[0] if index.target is aten.expand.default else None
    if axis == rank - 2 and isinstance(narrow, Node) and narrow.meta["val"].shape[-1] == 1:
        return lambda states, index: code.gather_rows(states, _flat_rows(index, states)), [states, narrow]
    return code.along(axis, code.gather_last), [states, index]


def _flat_rows(index: Tensor, states: Tensor) -> Tensor:
    """[..., N, 1] to [..., N], for every head of states [..., S, D]."""
    return index[..., 0].expand(*states.shape[:-2], -1)


def _scatter(node: Node) -> Written | None:
    states, index, new = node.args[0], node.args[2], node.args[3]
    axis = _axis(node)
    assert isinstance(states, Node) and isinstance(index, Node) and isinstance(new, Node)
    have, wanted = (n.meta["val"].shape[axis] for n in (states, index))
    if isinstance(have, int) and isinstance(wanted, int) and wanted <= have:
        return None
    return code.along(axis, code.scatter_padded), [states, index, new]


def _scatter_value(node: Node) -> Written:
    states, index, number = node.args[0], node.args[2], node.args[3]
    axis = _axis(node)
    assert isinstance(states, Node) and isinstance(index, Node) and isinstance(number, bool | int | float)

    def scattered(states: Tensor, index: Tensor) -> Tensor:
        whole = states.to(torch.int32) if states.dtype is torch.bool else states  # TensorRT scatters no booleans
        new = torch.full_like(index, int(number) if isinstance(number, bool) else number, dtype=whole.dtype)
        return code.along(axis, code.scatter_padded)(whole, index, new).to(states.dtype)

    return scattered, [states, index]


def _index_put(node: Node) -> Written | None:
    states, indices, new = node.args[:3]
    if argument(node, "accumulate") or not all(isinstance(index, Node) for index in indices):  # type: ignore[union-attr]
        return None
    return lambda states, new, *indices: code.put(states, new, indices), [states, new, *indices]  # type: ignore


def _slice_scatter(node: Node) -> Written | None:
    """All of it."""
    states, new = node.args[:2]
    assert isinstance(states, Node) and isinstance(new, Node)
    if [str(size) for size in states.meta["val"].shape] != [str(size) for size in new.meta["val"].shape]:
        return None
    return lambda new: new.clone(), [new]


def _variance(node: Node) -> Written:
    (values,) = node.all_input_nodes[:1]
    axes = [axis % values.meta["val"].dim() for axis in argument(node, "dim")]  # type: ignore[attr-defined]
    schema = {parameter.name for parameter in node.target._schema.arguments}  # type: ignore[union-attr]
    given = argument(node, "correction") if "correction" in schema else argument(node, "unbiased")
    correction, keepdim = 1.0 if given is None else float(given), bool(argument(node, "keepdim"))  # type: ignore[arg-type]
    is_deviation = "std" in str(node.target)

    def spread(values: Tensor) -> Tensor:
        found = code.variance(values, axes, correction, keepdim)
        return found.sqrt() if is_deviation else found

    return spread, [values]


def _argsort(node: Node) -> Written:
    values, descending = node.all_input_nodes[0], bool(argument(node, "descending"))
    return code.along(_axis(node), lambda values: code.order(values, descending=descending)), [values]


def _sort(node: Node) -> Written | None:
    if not _first_alone(node):
        return None
    values, descending = node.all_input_nodes[0], bool(argument(node, "descending"))
    return code.along(_axis(node), lambda values: code.sort(values, descending=descending)), [values]


def _median(node: Node) -> Written | None:
    if not _first_alone(node):
        return None
    (values,), keepdim, axis = node.all_input_nodes, argument(node, "keepdim"), _axis(node)
    found = code.along(axis, code.median)
    return lambda values: found(values) if keepdim else found(values).squeeze(axis), [values]


def _first_alone(node: Node) -> bool:
    return all(user.target is operator.getitem and user.args[1] == 0 for user in node.users)


def _divide(node: Node) -> Written | None:
    """Of whole numbers, which TensorRT would round."""
    numbers = [n for n in node.args if isinstance(n, Node) and isinstance(n.meta["val"], Tensor)]
    if any(n.meta["val"].is_floating_point() for n in numbers) or len(numbers) != sum(
        isinstance(n, Node) for n in node.args
    ):
        return None
    dtype, args = node.meta["val"].dtype, node.args

    def divided(*tensors: Tensor) -> Tensor:
        rest = iter(tensors)
        top, bottom = (next(rest).to(dtype) if isinstance(n, Node) else n for n in args)
        return torch.div(top, bottom)  # type: ignore[arg-type]

    return divided, numbers


Rule = Callable[[Node], Written | None]
RULES: Mapping[object, Rule] = {
    aten.gather.default: _gather,
    aten.scatter.src: _scatter,
    aten.scatter.value: _scatter_value,
    aten.index_put.default: _index_put,
    aten.slice_scatter.default: _slice_scatter,
    aten.std.dim: _variance,
    aten.var.dim: _variance,
    aten.std.correction: _variance,
    aten.var.correction: _variance,
    aten.argsort.stable: _argsort,
    aten.argsort.default: _argsort,
    aten.sort.default: _sort,
    aten.sort.stable: _sort,
    aten.median.dim: _median,
    aten.div.Tensor: _divide,
}
NO_FORM = {
    "while_loop": "loop of torch",
    "cond": "condition of torch",
    "linalg_cholesky_ex": "Cholesky factor",
    "linalg_cholesky": "Cholesky factor",
    "linalg_solve": "solution of linear equations",
    "linalg_solve_triangular": "solution of linear equations",
    "linalg_inv": "inverse matrix",
    "linalg_svd": "singular values",
    "linalg_eigh": "eigenvalues",
    "linalg_qr": "QR factors",
}
BITWISE = {aten.__xor__.Tensor, aten.bitwise_xor.Tensor}
