"""Canonical text of exported programs, and what two packages differ in."""

import difflib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from kvpass.deployment.manifest import input_symbols, size_text
from kvpass.ir.printer import DTYPES, SILENT_KEYWORDS, op_name
from kvpass.ir.symbols import SYMBOLIC

TEXTS = "graphs"  # the folder of a package that holds `<phase>.txt`
CHECKS = (torch.ops.aten._assert_scalar.default, torch.ops.aten._assert_tensor_metadata.default)
CONTEXT = 1  # lines around a change


def program_text(program: ExportedProgram) -> str:
    """One line a node: `f32[1, S, 64] mul(add.2, weight)`; equal in every process and for every example.

    A line does not change with what stands elsewhere: values have no numbers of their own, `add` is the last sum in
    front of the line, `add.2` the one before that. Sizes are those of the inputs: S, C_0.
    """
    return "\n".join(_lines(program)) + "\n"


def diff_text(before: Mapping[str, str], after: Mapping[str, str]) -> str:
    """What changed between programs, by name: removed (-) and added (+) lines under the name; empty if nothing."""
    found: list[str] = []
    for name in dict.fromkeys([*before, *after]):
        old, new = (texts.get(name, "").splitlines() for texts in (before, after))
        changed = difflib.unified_diff(old, new, n=CONTEXT, lineterm="")
        lines = ["..." if line.startswith("@@") else line for line in changed if not line.startswith(("---", "+++"))]
        found += [f"{name}:", *lines] if lines else []
    return "".join(f"{line}\n" for line in found)


def _lines(program: ExportedProgram) -> Iterator[str]:
    signature = program.graph_signature
    stored = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    stored |= signature.inputs_to_lifted_tensor_constants
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    inputs = {node.name: node.meta["val"] for node in placeholders if node.name not in stored}
    printer = _Printer(input_symbols(inputs), {n: str(stored[n.name]) for n in placeholders if n.name in stored})
    *body, last = printer.lines(program.graph_module)
    yield from body
    returned = last.removeprefix("returns [").removesuffix("]").split(", ")
    named = pytree.tree_unflatten(returned[-len(signature.user_outputs) :], program.call_spec.out_spec)
    keyed = named.items() if isinstance(named, dict) else enumerate(pytree.tree_leaves(named))
    yield from (f"returns {name}: {value}" for name, value in keyed)


class _Printer:
    def __init__(self, symbols: Mapping[Any, Any], weights: Mapping[Node, str]) -> None:
        self._symbols, self._weights = dict(symbols), weights

    def lines(self, module: GraphModule, indent: str = "") -> Iterator[str]:
        counts: dict[str, int] = defaultdict(int)
        number: dict[Node, int] = {}

        def atom(value: object) -> str:
            if isinstance(value, Node):
                if isinstance(value.meta.get("val"), SYMBOLIC):
                    return self._size(value.meta["val"])
                if value in number:
                    back = counts[op_name(value)] - number[value]
                    return f"{op_name(value)}.{back + 1}" if back else op_name(value)
                return self._weights.get(value, str(value.target))
            if isinstance(value, list | tuple):
                return f"[{', '.join(map(atom, value))}]"
            if isinstance(value, torch.dtype):
                return DTYPES.get(value, str(value))
            if isinstance(value, float):
                return f"{value:.6g}"
            return "end" if value == 2**63 - 1 else str(value)

        for node in module.graph.nodes:
            value = node.meta.get("val")
            branch = getattr(module, str(node.target), None) if node.op == "get_attr" else None
            if node.op == "placeholder":
                kind = "weight" if node in self._weights else "input"
                yield f"{indent}{kind} {self._weights.get(node, node.name)}: {self._type(value)}"
            elif node.op == "call_function" and not isinstance(value, SYMBOLIC) and node.target not in CHECKS:
                named = [f"{k}={atom(v)}" for k, v in node.kwargs.items() if k not in SILENT_KEYWORDS]
                yield f"{indent}{self._type(value)} {op_name(node)}({', '.join([*map(atom, node.args), *named])})"
                counts[op_name(node)] += 1
                number[node] = counts[op_name(node)]
            elif isinstance(branch, GraphModule):
                yield f"{indent}branch {node.target}:"
                yield from self.lines(branch, indent + "  ")
            elif node.op == "output":
                yield f"{indent}returns {atom(node.args[0])}"

    def _size(self, size: Any) -> str:
        return size_text(size, self._symbols)

    def _type(self, value: object) -> str:
        if isinstance(value, Tensor):
            return f"{DTYPES.get(value.dtype, str(value.dtype))}[{', '.join(map(self._size, value.shape))}]"
        return f"({', '.join(map(self._type, value))})" if isinstance(value, tuple | list) else "-"
