"""A program as JSON: its graph, ports and sizes, everything but the tensors that it names."""

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
from torch import SymInt, Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule, Node
from torch.utils._sympy import functions as torch_functions

from kvpass.ir.attention_site import SiteMark
from kvpass.ir.form import Form, Phase
from kvpass.ir.holder import holder
from kvpass.ir.masks import Causal, Chunked, Sliding
from kvpass.ir.program import KVProgram, Origin, Port, Role
from kvpass.ir.symbols import SymbolicShapes, expression

PLAIN = {f"operator.{name}": getattr(operator, name) for name in ("add", "sub", "mul", "floordiv", "mod", "getitem")}
PLAIN |= {f"torch.{name}": getattr(torch, name) for name in ("sym_int", "sym_float", "sym_max", "sym_min")}
TARGETS = {target: name for name, target in PLAIN.items()}
MASKS: dict[str, Any] = {kind.__name__: kind for kind in (Causal, Sliding, Chunked)}
SYMPY = {name: getattr(sympy, name) for name in ("Add", "Mul", "Pow", "Integer", "Max", "Min")}
SYMPY |= {name: getattr(torch_functions, name) for name in ("FloorDiv", "Mod", "PythonMod", "CleanDiv", "Max", "Min")}


class NotStorableError(Exception):
    """A program holds something that has no form in a file."""


def program_to_json(program: KVProgram) -> dict[str, Any]:
    """What `program_from_json` reads. Raises `NotStorableError` for loops and for sizes that only data can tell."""
    writer = _Writer(program.shapes)
    return {
        "form": program.form.name,
        "phase": program.phase.value if program.phase else None,
        "inputs": [_port(port) for port in program.inputs],
        "outputs": [_port(port) for port in program.outputs],
        "sizes": program.shapes.declared(),
        "layer_count": program.layer_count,
        "model_name": program.model_name,
        "max_tokens": program.max_tokens,
        "rows_share_positions": program.rows_share_positions,
        "notes": list(program.notes),
        "history": list(program.history),
        "nodes": [writer.node(node) for node in program.graph.nodes],
    }


def program_from_json(data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> KVProgram:
    """The program over `tensors`, which have the names of its parameters and buffers."""
    shapes = SymbolicShapes()
    for name, size in data["sizes"].items():
        shapes.fix(name, size) if isinstance(size, int) else shapes.dim(name, *size)
    reader = _Reader(shapes, tensors)
    for node in data["nodes"]:
        reader.add(node)
    return KVProgram(
        graph_module=GraphModule(holder({name: tensors[name] for name in reader.named}), reader.graph),
        form=Form[data["form"]],
        inputs=tuple(map(_port_of, data["inputs"])),
        outputs=tuple(map(_port_of, data["outputs"])),
        shapes=shapes,
        phase=Phase(data["phase"]) if data["phase"] else None,
        layer_count=data["layer_count"],
        model_name=data["model_name"],
        max_tokens=data["max_tokens"],
        rows_share_positions=data["rows_share_positions"],
        notes=tuple(data["notes"]),
        history=tuple(data["history"]),
    )


def _port(port: Port) -> list[Any]:
    return [port.name, port.role.value, port.layer, port.updates, port.key]


def _port_of(data: list[Any]) -> Port:
    return Port(data[0], Role(data[1]), *data[2:])


class _Writer:
    def __init__(self, shapes: SymbolicShapes) -> None:
        self.shapes = shapes
        self.texts: dict[Any, int | str] = {}

    def node(self, node: Node) -> dict[str, Any]:
        told: dict[str, Any] = {"op": node.op, "name": node.name, "target": self._target(node)}
        told |= {"args": self._value(node.args), "kwargs": {k: self._value(v) for k, v in node.kwargs.items()}}
        told["val"] = self._val(node.meta.get("val"))
        if (site := node.meta.get("site")) is not None:
            told["site"] = [site.layer, site.holder, site.path, type(site.mask).__name__, site.mask.reach]
        if isinstance(origin := node.meta.get("kvpass"), Origin):
            told["origin"] = [origin.made_by, origin.role, origin.layer]
        if stack := node.meta.get("nn_module_stack"):
            told["stack"] = [str(path) for path, _ in stack.values()]
        told |= {name: node.meta[name] for name in ("press", "evicted") if name in node.meta}
        return told

    def _target(self, node: Node) -> str:
        if node.op != "call_function":
            return str(node.target)
        if isinstance(node.target, torch._ops.OpOverload):
            return str(node.target)
        if node.target not in TARGETS:
            raise NotStorableError(f"node {node.name}: {node.target}")
        return TARGETS[node.target]

    def _value(self, value: object) -> Any:
        match value:
            case Node():
                return {"node": value.name}
            case None | bool() | int() | float() | str():
                return value
            case tuple():
                return {"tuple": [self._value(item) for item in value]}
            case list():
                return [self._value(item) for item in value]
            case torch.dtype() | torch.layout() | torch.memory_format():
                return {"torch": str(value).removeprefix("torch.")}
            case torch.device():
                return {"device": str(value)}
        raise NotStorableError(f"an argument is {value!r}, a {type(value).__name__}")

    def _val(self, value: object) -> Any:
        match value:
            case FakeTensor():
                sizes = [[self._size(size) for size in axes] for axes in (value.shape, value.stride())]
                return {"tensor": [*sizes, str(value.dtype).removeprefix("torch."), str(value.device)]}
            case SymInt():
                return {"size": self._size(value)}
            case tuple() | list():
                return {"several": [self._val(item) for item in value]}
            case None | bool() | int() | float():
                return value
        raise NotStorableError(f"a value is a {type(value).__name__}")

    def _size(self, size: int | SymInt) -> int | str:
        if not isinstance(size, SymInt):
            return size
        expr = size.node.expr
        if expr not in self.texts:
            named = self.shapes.named(expr)
            if not all(symbol.name in self.shapes.declared() for symbol in named.free_symbols):
                raise NotStorableError(f"the size {expr} is no size of an input")
            self.texts[expr] = int(named) if named.is_Integer else sympy.srepr(named)
        return self.texts[expr]


class _Reader:
    def __init__(self, shapes: SymbolicShapes, tensors: Mapping[str, Tensor]) -> None:
        self.shapes, self.tensors = shapes, tensors
        self.graph = Graph()
        self.nodes: dict[str, Node] = {}
        self.named: list[str] = []
        self.sizes: dict[str, SymInt] = {}
        self.tensor_values: dict[Any, Tensor] = {}
        self.paths: dict[tuple[str, ...], dict[str, tuple[str, str]]] = {}

    def add(self, data: Mapping[str, Any]) -> None:
        target: Any = _target_of(data["target"]) if data["op"] == "call_function" else data["target"]
        args, kwargs = self._value(data["args"]), {k: self._value(v) for k, v in data["kwargs"].items()}
        node = self.graph.create_node(data["op"], target, args, kwargs, data["name"])
        self.nodes[data["name"]] = node
        if data["op"] == "output":
            return
        if data["op"] == "get_attr":
            self.named.append(target)
            node.meta["val"] = self.shapes.fake(self.tensors[target])
        else:
            node.meta["val"] = self._val(data["val"])
        if "site" in data:
            layer, held_by, path, mask, reach = data["site"]
            node.meta["site"] = SiteMark(layer, held_by, path, MASKS[mask](*([] if reach is None else [reach])))
        if "origin" in data:
            node.meta["kvpass"] = Origin(*data["origin"])
        if "stack" in data:
            paths = tuple(data["stack"])
            node.meta["nn_module_stack"] = self.paths.setdefault(paths, {path: (path, "") for path in paths})
        node.meta |= {name: data[name] for name in ("press", "evicted") if name in data}

    def _value(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._value(item) for item in value]
        if not isinstance(value, dict):
            return value
        ((kind, inner),) = value.items()
        match kind:
            case "node":
                return self.nodes[inner]
            case "tuple":
                return tuple(self._value(item) for item in inner)
            case "device":
                return torch.device(inner)
        return getattr(torch, inner)

    def _val(self, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        ((kind, inner),) = value.items()
        if kind == "size":
            return self._size(inner)
        if kind == "several":
            return tuple(self._val(item) for item in inner)
        shape, stride, dtype, device = inner
        key = (*map(tuple, (shape, stride)), dtype, device)
        if key not in self.tensor_values:
            with self.shapes.fake_mode:
                sizes = [[self._size(size) for size in axes] for axes in (shape, stride)]
                self.tensor_values[key] = torch.empty_strided(*sizes, dtype=getattr(torch, dtype), device=device)
        return self.tensor_values[key]

    def _size(self, text: int | str) -> int | SymInt:
        if isinstance(text, int):
            return text
        if text not in self.sizes:
            expr = _expression(ast.parse(text, mode="eval").body, lambda name: expression(self.shapes[name]))
            self.sizes[text] = self.shapes.shape_env.create_symintnode(expr, hint=None)  # type: ignore[assignment]
        return self.sizes[text]


def _target_of(name: str) -> Any:
    if name in PLAIN:
        return PLAIN[name]
    return operator.attrgetter(name)(torch.ops)


def _expression(tree: ast.expr, symbol: Callable[[str], Any]) -> Any:
    """What sympy wrote with srepr, read without running it."""
    match tree:
        case ast.Call(func=ast.Name(id="Symbol"), args=[ast.Constant(value=str(name))]):
            return symbol(name)
        case ast.Call(func=ast.Name(id=name), args=args) if name in SYMPY:
            return SYMPY[name](*(_expression(argument, symbol) for argument in args))
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int(number))):
            return -number
        case ast.Constant(value=int(number)):
            return number
    raise NotStorableError(f"a size is {ast.unparse(tree)}")
