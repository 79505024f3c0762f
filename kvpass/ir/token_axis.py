"""What operators need of their arguments where nobody needs more of their results than the last token.

Tokens lie along an axis. It may hold those of one row behind those of another, as [B * S, D] does: then its size is a
multiple of S, and the last of every S entries is meant.
"""

import operator
from collections import Counter
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from kvpass.ir.attention_op import ATTENTION
from kvpass.ir.attention_site import SDPA, is_attention
from kvpass.ir.subgraph import argument, set_argument
from kvpass.ir.symbols import expression

aten = torch.ops.aten
Places = list[tuple[Node, int]] | None  # arguments, and which axis of each; None: not understood
ELEMENTWISE = (
    aten._to_copy.default,
    aten.to.dtype,
    aten.type_as.default,
    aten.alias.default,
    aten.copy.default,
    aten.multiply.Tensor,
)
VIEWS = (aten.reshape.default, aten.view.default, aten._unsafe_view.default)


def needed(node: Node, axis: int, tokens: sympy.Expr) -> dict[Node, int] | None:
    """The arguments that are needed of the last token alone, and along which axis, if along `axis` the result is.

    All others are needed in full. None: the operator mixes tokens, or nothing is known of it.
    """
    if node.target in (*VIEWS, aten.unsqueeze.default):
        places = _reshaped(node, axis, tokens)
    else:
        rule = _broadcast if _is_elementwise(node) else RULES.get(node.target)
        places = rule(node, axis) if rule is not None else None
    if places is None:
        return None
    read, partly = Counter(_read(node)), Counter(source for source, _ in places)
    twice = len(set(places)) > len(partly) or any(read[source] > count for source, count in partly.items())
    return None if twice else dict(places)  # a tensor that is needed in two ways is needed in full


def narrow(node: Node, axis: int, tokens: sympy.Expr) -> None:
    """Make the arguments of a node fit that reads one token where it read all."""
    if is_attention(node):
        set_argument(node, "is_causal", False)  # the last token sees them all
    elif node.target in (*VIEWS, aten.expand.default):
        sizes = _numbers(node)
        if sizes[axis] != -1:
            sizes[axis] = 1 if shape_of(node)[axis] == tokens else -1
        node.update_arg(1, sizes)


def shape_of(node: Node) -> list[sympy.Expr]:
    """Sizes as expressions; those of the first tensor, if there are several."""
    value = node.meta["val"]
    return [expression(size) for size in (value if isinstance(value, Tensor) else value[0]).shape]


# -- rules: where in the arguments an axis of the result is --------------------------------------------------------


def _broadcast(node: Node, axis: int) -> Places:
    behind = len(shape_of(node)) - axis
    places = [(source, len(shape_of(source)) - behind) for source in _read(node)]
    return [(source, at) for source, at in places if at >= 0 and shape_of(source)[at] != 1]


def _expanded(node: Node, axis: int) -> Places:
    return _broadcast(node, axis) or None


def _repeated(node: Node, axis: int) -> Places:
    (source,) = _read(node)
    at = axis - len(shape_of(node)) + len(shape_of(source))
    return [(source, at)] if at >= 0 and _numbers(node)[axis] == 1 else None


def _along(node: Node, axis: int) -> Places:
    """Operators along `dim` that leave all axes where they are."""
    alike = len({len(shape_of(source)) for source in _read(node)}) == 1
    return [(source, axis) for source in _read(node)] if alike and _dim(node) != axis else None


def _selected(node: Node, axis: int) -> Places:
    return [(source, axis + (_dim(node) <= axis)) for source in _read(node)]


def _stacked(node: Node, axis: int) -> Places:
    dim = _dim(node, more=1)
    return [(source, axis - (dim < axis)) for source in _read(node)] if dim != axis else None


def _reduced(node: Node, axis: int) -> Places:
    (source,) = _read(node)
    rank, dim = len(shape_of(source)), argument(node, "dim")
    dims = {d % rank for d in (dim if isinstance(dim, list | tuple) else [dim]) if isinstance(d, int)} or range(rank)
    at = [i for i in range(rank) if argument(node, "keepdim") or i not in dims][axis]
    return [(source, at)] if at not in dims else None


def _transposed(node: Node, axis: int) -> Places:
    (source,) = _read(node)
    order = list(range(len(shape_of(source))))
    one, other = node.args[1:]
    order[one], order[other] = order[other], order[one]  # type: ignore[index]
    return [(source, order[axis])]


def _permuted(node: Node, axis: int) -> Places:
    (source,) = _read(node)
    return [(source, _numbers(node)[axis] % len(shape_of(source)))]


def _reshaped(node: Node, axis: int, tokens: sympy.Expr) -> Places:
    """The axis of tokens that has as much behind it in memory."""
    (source,) = _read(node)
    old, new = shape_of(source), shape_of(node)
    if node.target in VIEWS and new[axis] != tokens and -1 in _numbers(node) and _numbers(node)[axis] != -1:
        return None  # its new size could not be written down
    behind = sympy.Mul(*new[axis + 1 :])
    found = [i for i, size in enumerate(old) if sympy.Mul(*old[i + 1 :]) == behind and (size / tokens).is_integer]
    return [(source, found[0])] if found else None


def _projected(node: Node, axis: int) -> Places:
    return [(_read(node)[0], axis)] if axis < len(shape_of(node)) - 1 else None


def _multiplied(node: Node, axis: int) -> Places:
    """Rows of the first matrices, columns of the second ones, or a batch of both."""
    (one, other), rank = _read(node), len(shape_of(node))
    if min(len(shape_of(one)), len(shape_of(other))) < 2:
        return None
    if axis < rank - 2:
        return _broadcast(node, axis)
    return [(one, len(shape_of(one)) - 2)] if axis == rank - 2 else [(other, len(shape_of(other)) - 1)]


def _multiplied_and_added(node: Node, axis: int) -> Places:
    bias, states, _ = _read(node)
    return [(states, 0)] if axis == 0 and len(shape_of(bias)) == 1 else None


def _normed(node: Node, axis: int) -> Places:
    apart = len(shape_of(node)) - len(argument(node, "normalized_shape"))  # type: ignore[arg-type]
    return [(_read(node)[0], axis)] if axis < apart else None


def _attended(node: Node, axis: int) -> Places:
    """Queries of a located attention, which are those of the tokens; a row of its mask is of a query."""
    query, mask = argument(node, "query"), argument(node, "attn_mask")
    if "site" not in node.meta or axis != 2 or not isinstance(query, Node):
        return None
    rows = [(mask, len(shape_of(mask)) - 2)] if isinstance(mask, Node) and shape_of(mask)[-2] != 1 else []
    return [(query, axis), *rows]


def _got(node: Node, axis: int) -> Places:
    return [(_read(node)[0], axis)]


RULES: dict[Any, Callable[[Node, int], Places]] = {
    operator.getitem: _got,
    aten.expand.default: _expanded,
    aten.repeat.default: _repeated,
    aten.transpose.int: _transposed,
    aten.permute.default: _permuted,
    aten.select.int: _selected,
    aten.unbind.int: _selected,
    aten.stack.default: _stacked,
    aten.linear.default: _projected,
    aten.matmul.default: _multiplied,
    aten.bmm.default: _multiplied,
    aten.mm.default: _multiplied,
    aten.addmm.default: _multiplied_and_added,
    aten.layer_norm.default: _normed,
    aten.native_layer_norm.default: _normed,
    aten.rms_norm.default: _normed,
    SDPA: _attended,
    ATTENTION: _attended,
    **dict.fromkeys(
        [
            aten.cat.default,
            aten.chunk.default,
            aten.cumsum.default,
            aten.glu.default,
            aten.log_softmax.int,
            aten.slice.Tensor,
            aten.slice_scatter.default,
            aten.softmax.int,
            aten._softmax.default,
            aten.split.Tensor,
            aten.split_with_sizes.default,
        ],
        _along,
    ),
    **dict.fromkeys(
        [
            aten.amax.default,
            aten.linalg_vector_norm.default,
            aten.max.dim,
            aten.mean.dim,
            aten.sum.dim_IntList,
            aten.var.correction,
        ],
        _reduced,
    ),
}


def _is_elementwise(node: Node) -> bool:
    tags, schema = getattr(node.target, "tags", ()), getattr(node.target, "_schema", None)
    pointwise = torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags
    return node.target in ELEMENTWISE or (pointwise and schema is not None and not schema.is_mutable)


def _read(node: Node) -> list[Node]:
    """The tensors among the arguments, as often as they are given."""
    found: list[Node] = []
    map_arg((node.args, node.kwargs), found.append)
    return [source for source in found if isinstance(source.meta["val"], Tensor | tuple | list)]


def _dim(node: Node, more: int = 0) -> int:
    return int(argument(node, "dim")) % (len(shape_of(_read(node)[0])) + more)  # type: ignore[call-overload,no-any-return]


def _numbers(node: Node) -> list[Any]:
    """What a view or an expansion is given as sizes, a permutation as axes, a repetition as counts."""
    return list(node.args[1])  # type: ignore[arg-type]
