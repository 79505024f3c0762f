"""Canonical text of a graph, and the difference that a pass makes to one layer."""

import difflib
import operator
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.fx import Node

from kvpass.ir.program import KVProgram, Origin, layer_of
from kvpass.ir.symbols import SYMBOLIC

# Printed inside their only reader: they move data about and say nothing on a line of their own.
FOLDED = frozenset(
    [
        "view",
        "reshape",
        "_unsafe_view",
        "expand",
        "transpose",
        "permute",
        "unsqueeze",
        "squeeze",
        "slice",
        "select",
        "clone",
        "flatten",
        "unflatten",
        "contiguous",
        "t",
        "alias",
        "getitem",
        "to",
        "_to_copy",
    ]
)
LONGEST_FOLDED = 72  # characters; what a pass computed on the way stands inside its only reader if it is short
SILENT_KEYWORDS = frozenset({"device", "layout", "pin_memory"})
DTYPES = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "bool",
}


class Printer:
    """One line a node: `name: dtype[shape] = op(args)`, sizes in our names, no addresses, no hashes."""

    def __init__(self, program: KVProgram) -> None:
        self.program = program

    def lines(self) -> Iterator[tuple[int | None, str]]:
        """Pairs of layer and text, in graph order."""
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                yield layer_of(node), f"input {node.name}: {self._type(node)}"
            elif node.op == "call_function" and not self._is_folded(node):
                yield layer_of(node), f"{node.name}: {self._type(node)} = {self._call(node)}"
        for port in self.program.outputs:
            target = f" -> {port.updates}" if port.updates else ""
            value = self.program.output_value(port.role, port.layer)
            yield port.layer, f"output {port.name}: {self._atom(value)}{target}"

    def text(self) -> str:
        phase = self.program.phase.value if self.program.phase else self.program.form.name.lower()
        return "\n".join([f"graph {phase}:", *(f"  {line}" for _, line in self.lines())]) + "\n"

    def layer_lines(self, layer: int | None) -> list[str]:
        """The lines of one layer; those outside all layers for `None`."""
        return [line for owner, line in self.lines() if owner == layer]

    def _type(self, node: Node) -> str:
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            sizes = ", ".join(map(self.program.shapes.text, value.shape))
            return f"{DTYPES.get(value.dtype, str(value.dtype))}[{sizes}]"
        return "(...)" if isinstance(value, tuple | list) else "?"

    def _is_folded(self, node: Node) -> bool:
        if isinstance(node.meta.get("val"), SYMBOLIC):
            return True  # a size prints as its value wherever it is used
        if _origin(node) is None:
            # Readers that a pass added do not count, so that a line does not change because something reads it.
            readers = [user for user in node.users if _origin(user) is None]
            return op_name(node) in FOLDED and len(readers) <= 1
        if _origin(node).role or len(node.users) != 1 or _writes(node):  # type: ignore[union-attr]
            return False
        return op_name(node) in FOLDED or len(self._call(node)) <= LONGEST_FOLDED

    def _call(self, node: Node) -> str:
        if node.target is operator.getitem:
            return f"{self._atom(node.args[0])}[{node.args[1]}]"
        positional = [self._atom(arg) for arg in node.args]
        named = [f"{k}={self._atom(v)}" for k, v in node.kwargs.items() if k not in SILENT_KEYWORDS]
        return f"{op_name(node)}({', '.join(positional + named)})"

    def _atom(self, arg: object) -> str:
        if isinstance(arg, Node):
            if isinstance(arg.meta.get("val"), SYMBOLIC):
                return self.program.shapes.text(arg.meta["val"])
            if arg.op == "get_attr":
                return str(arg.target)
            return self._call(arg) if arg.op == "call_function" and self._is_folded(arg) else arg.name
        if isinstance(arg, list | tuple):
            return f"[{', '.join(map(self._atom, arg))}]"
        if isinstance(arg, torch.dtype):
            return DTYPES.get(arg, str(arg))
        if isinstance(arg, float):
            return f"{arg:.6g}"
        return "end" if arg == 2**63 - 1 else str(arg)


def _origin(node: Node) -> Origin | None:
    origin = node.meta.get("kvpass")
    return origin if isinstance(origin, Origin) else None


def _writes(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def op_name(node: Node) -> str:
    """`aten.mul.Tensor` as `mul`; operators of other libraries with their namespace."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return getattr(node.target, "__name__", str(node.target))
    namespace, name = schema.name.split("::")
    return str(name if namespace == "aten" else f"{namespace}.{name}")


def graph_text(program: KVProgram) -> str:
    """The whole program as canonical text."""
    return Printer(program).text()


def graph_diff(before: KVProgram, after: KVProgram, layer: int | None = 0) -> str:
    """What changed in one layer (`None`: outside all layers), as removed (-) and added (+) lines."""
    old, new = (Printer(program).layer_lines(layer) for program in (before, after))
    diff = difflib.unified_diff(old, new, n=0, lineterm="")
    return "\n".join(line for line in diff if not line.startswith(("---", "+++", "@@"))) + "\n"
