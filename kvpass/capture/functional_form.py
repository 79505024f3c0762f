"""An export whose operators write to nothing, in the few forms that the passes know.

torch gets there by tracing everything once more, which takes longer than the export itself. A model that writes to
nothing needs no trace: its operators are functions already, but for some that may return their input.
"""

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._decomp import get_decompositions
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.fx import Node

from kvpass.ir.subgraph import argument
from kvpass.ir.symbols import SYMBOLIC

aten = torch.ops.aten
Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


def _complex(real: Tensor, imaginary: Tensor) -> Tensor:
    return torch.view_as_complex(torch.stack([real, imaginary], dim=-1))


def _polar(size: Tensor, angle: Tensor) -> Tensor:
    return _complex(size * angle.cos(), size * angle.sin())


# Operators stay whole, but for those whose fake kernels freeze sizes, or refuse symbolic ones (baddbmm).
DECOMPOSITIONS = {
    aten.polar.default: _polar,
    aten.complex.default: _complex,
    **get_decompositions((aten.baddbmm.default,)),
}


def functional(exported: ExportedProgram) -> ExportedProgram:
    """The same in functional form, with attention and linear whole: itself, if `as_function` knows all its calls."""
    calls = (node for node in exported.graph.nodes if node.op in ("call_function", "get_attr"))
    if all(node.op == "call_function" and as_function(node) is not None for node in calls):
        return exported
    decomposed: ExportedProgram = exported.run_decompositions(DECOMPOSITIONS)
    return decomposed


def as_function(node: Node) -> Call | None:
    """A call of the same value that returns no alias of its input by the way; None where that takes a trace."""
    target: Any = node.target
    if target in FORMS:
        return FORMS[target](node)
    if not isinstance(target, OpOverload):
        on_sizes = isinstance(node.meta.get("val"), (*SYMBOLIC, int, float, bool))
        return _unchanged(node) if on_sizes or target is operator.getitem else None
    schema, composite = target._schema, "CompositeImplicitAutograd"
    aliases = any(returned.alias_info is not None for returned in schema.returns)
    hidden = aliases and torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), composite)
    return None if schema.is_mutable or target in DECOMPOSITIONS or hidden else _unchanged(node)


def _unchanged(node: Node) -> Call:
    target: Any = node.target
    return target, node.args, dict(node.kwargs)


def _cast(node: Node) -> Call | None:
    wanted = {name: argument(node, name) for name in ("dtype", "layout", "device") if _has(node, name)}
    return aten._to_copy.default, node.args[:1], {name: value for name, value in wanted.items() if value is not None}


def _contiguous(node: Node) -> Call | None:
    return aten.clone.default, node.args[:1], {"memory_format": torch.contiguous_format}


def _dropout(node: Node) -> Call | None:
    return None if argument(node, "train") else (aten.clone.default, node.args[:1], {})


def _chunk(node: Node) -> Call | None:
    states, count, axis = node.args[0], argument(node, "chunks"), argument(node, "dim")
    assert isinstance(states, Node) and isinstance(count, int) and isinstance(axis, int)
    size = states.meta["val"].shape[axis]
    return (aten.split.Tensor, (states, -(-size // count), axis), {}) if isinstance(size, int) else None


def _has(node: Node, name: str) -> bool:
    return any(parameter.name == name for parameter in node.target._schema.arguments)  # type: ignore[union-attr]


FORMS: Mapping[OpOverload, Callable[[Node], Call | None]] = {
    aten.to.dtype: _cast,
    aten.to.dtype_layout: _cast,
    aten.to.device: _cast,
    aten.contiguous.default: _contiguous,
    aten.dropout.default: _dropout,
    aten.chunk.default: _chunk,
    aten.reshape.default: _unchanged,  # may copy, which it does unseen
}
