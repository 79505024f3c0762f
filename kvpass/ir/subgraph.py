"""Cut a piece out of a graph by dataflow, and run it again on other tensors."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_aggregate, map_arg

from kvpass.ir.symbols import Size


def nodes_between(outputs: Iterable[Node], stops: Iterable[Node]) -> list[Node]:
    """All nodes that `outputs` depend on, not looking behind `stops` nor behind sizes, in graph order without stops."""
    stop = set(stops)
    seen: set[Node] = set()
    work = [node for node in outputs if node not in stop]
    while work:
        node = work.pop()
        if node in seen:
            continue
        seen.add(node)
        if not _reads_size(node):
            work.extend(source for source in node.all_input_nodes if source not in stop)
    return sorted(seen)


def reached_from(sources: Iterable[Node], nodes: Iterable[Node]) -> set[Node]:
    """Those of `nodes` (in graph order) that depend on one of `sources` through tensors, not only through sizes."""
    reached = set(sources)
    for node in nodes:
        if isinstance(node.meta.get("val"), Tensor | tuple | list) and any(
            source in reached for source in node.all_input_nodes
        ):
            reached.add(node)
    return reached


@dataclass(frozen=True)
class Subgraph:
    """The computation of `outputs` from `inputs`, as a function that can be run, or traced into a graph again."""

    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]

    @property
    def body(self) -> list[Node]:
        return [node for node in nodes_between(self.outputs, self.inputs) if node.op == "call_function"]

    def leaves(self) -> list[Node]:
        """Placeholders and attributes that the computation needs beside its inputs."""
        return [node for node in nodes_between(self.outputs, self.inputs) if node.op in ("placeholder", "get_attr")]

    def fingerprint(self) -> str:
        """Equal for subgraphs that compute the same function, whatever their nodes are called."""
        labels = {node: f"in{i}" for i, node in enumerate(self.inputs)}
        labels |= {node: str(node.target) for node in self.leaves()}
        lines = []
        for i, node in enumerate(self.body):
            labels[node] = f"v{i}"
            arguments = map_arg((node.args, node.kwargs), lambda n: _Label(labels.get(n, "size")))
            lines.append(f"{node.target}{arguments}")
        return "; ".join([*lines, *(labels[node] for node in self.outputs)])

    def run(
        self, tensors: Mapping[Node, Tensor], sizes: Mapping[str, Size], *, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, ...]:
        """Compute the outputs for other tensors. `sizes` gives the value of a symbol whose tensor is not among them.

        `sizes` is keyed by torch's own name of the symbol. With `dtype`, whatever floats are cast to or made in is
        that instead.
        """
        values: dict[Node, Any] = dict(tensors)
        for node in self.body:
            if _reads_size(node) and node.args[0] not in values:
                values[node] = sizes[str(node.meta["val"].node.expr)]
                continue
            values[node] = call(node, values.__getitem__, dtype)
        return tuple(values[node] for node in self.outputs)


def call(node: Node, value_of: Callable[[Node], Any], dtype: torch.dtype | None = None) -> Any:
    """Call the operator of a node on the values of its arguments; `dtype` replaces all floating ones among them."""
    args, kwargs = map_arg((node.args, node.kwargs), value_of)
    if dtype is not None:
        args, kwargs = map_aggregate(
            (args, kwargs), lambda a: dtype if isinstance(a, torch.dtype) and a.is_floating_point else a
        )
    target: Callable[..., Any] = node.target  # type: ignore[assignment]
    return target(*args, **kwargs)


class _Label(str):
    """Prints without quotes, so that a label and a string constant differ."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _reads_size(node: Node) -> bool:
    return getattr(node.target, "__name__", "").startswith("sym_size") and len(node.args) == 2


def argument(node: Node, name: str) -> object:
    """An argument of an operator node by its schema name, wherever it stands; its default if it is not given."""
    for index, parameter in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if parameter.name == name:
            if name in node.kwargs:
                return node.kwargs[name]
            return node.args[index] if index < len(node.args) else parameter.default_value
    raise KeyError(f"{node.target} has no argument {name!r}")


def set_argument(node: Node, name: str, value: object) -> None:
    """Replace an argument of an operator node by its schema name."""
    for index, parameter in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if parameter.name == name:
            if index < len(node.args):
                node.update_arg(index, value)  # type: ignore[arg-type]
            else:
                node.update_kwarg(name, value)  # type: ignore[arg-type]
            return
    raise KeyError(f"{node.target} has no argument {name!r}")


def as_nodes(values: Sequence[object]) -> list[Node]:
    return [value for value in values if isinstance(value, Node)]
