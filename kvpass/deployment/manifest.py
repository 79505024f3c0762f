"""What a package says about itself: a JSON text that a C++ program can read too."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import sympy
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from kvpass.errors import PackageError
from kvpass.ir.symbols import SYMBOLIC
from kvpass.package_files import versions

FORMAT = "kvpass-package-1"
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a phase."""

    name: str
    role: str  # "keys" of "keys_3", see kvpass.ir.program.Role; "lengths" and "next_position" are the rest of the state
    layer: int | None
    dtype: str  # of torch, without the prefix
    shape: tuple[int | str, ...]  # S new tokens, C_3 slots of layer 3, or an expression of them


@dataclass(frozen=True)
class PhaseSpec:
    """One program of a package."""

    name: str
    phase: str  # prefill, extend, decode, or any
    tokens: tuple[tuple[int, int], ...]  # first and last length of each range of prompts that it takes
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    writes: tuple[str, ...]  # inputs that it updates in place

    def takes(self, tokens: int) -> bool:
        """Whether it is for so many tokens at once."""
        return any(low <= tokens <= high for low, high in self.tokens)


@dataclass(frozen=True)
class LayerSpec:
    """What one layer stores per row."""

    kv_heads: int
    key_size: int
    value_size: int
    dtype: str
    pressed: bool
    ring: int | None  # slots of a layer of windows or chunks: token p lies in slot p % ring
    reads: int | None  # the layer whose keys and values it reads; it stores none then


@dataclass(frozen=True)
class Manifest:
    """All that is needed to run a package, and where it comes from."""

    kind: str  # exported_program, aot_inductor, onnx, tensorrt
    guard: str  # host: whoever runs it picks a phase; in_graph: the one program does
    press: str | None
    ratio: float | None
    target_size: int | None
    batch_size: int
    max_tokens: int  # of a whole text
    device: str
    eos_token_ids: tuple[int, ...]
    config: dict[str, Any]
    layers: tuple[LayerSpec, ...]
    phases: tuple[PhaseSpec, ...]
    weights: dict[str, dict[str, str]] = field(default_factory=dict)  # by phase: which record a tensor is
    records: dict[str, dict[str, Any]] = field(default_factory=dict)  # dtype, shape, stride of each record
    files: dict[str, str] = field(default_factory=dict)  # sha256 of all that is stored beside the manifest

    def phase(self, tokens: int, *, empty: bool) -> PhaseSpec:
        """The program for so many new tokens. Raises `PackageError` if there is none."""
        if tokens > 1 and empty:
            for spec in self.phases:
                if spec.phase == "prefill" and spec.takes(tokens):
                    return spec
        wanted = "decode" if tokens == 1 else "extend"
        for spec in self.phases:
            if spec.phase == wanted and spec.takes(tokens):
                return spec
        most = max(high for spec in self.phases for _, high in spec.tokens)
        raise PackageError(
            f"{tokens} tokens at once, this package was exported for up to {most}; export it with a greater max_tokens="
        )

    def to_json(self) -> str:
        """The text that `from_json` reads."""
        return json.dumps({"format": FORMAT, **versions(), **asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> "Manifest":
        """Raises `PackageError` for another format, and for other releases of kvpass or torch."""
        try:
            told = json.loads(text)
            if told.pop("format") != FORMAT:
                raise ValueError(f"its format is not {FORMAT}")
            written = {name: told.pop(name) for name in versions()}
            phases = tuple(_phase(phase) for phase in told.pop("phases"))
            layers = tuple(LayerSpec(**layer) for layer in told.pop("layers"))
            found = cls(phases=phases, layers=layers, **{**told, "eos_token_ids": tuple(told["eos_token_ids"])})
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise PackageError(f"{where} is no package that CompiledModel.export wrote: {error}") from error
        if written != versions():
            old, new = (" and ".join(f"{k} {v}" for k, v in told.items()) for told in (written, versions()))
            raise PackageError(f"{where} was exported by {old}, this is {new}; export the model again")
        return found


def phase_spec(name: str, phase: str, tokens: Sequence[tuple[int, int]], program: ExportedProgram) -> PhaseSpec:
    """What an exported phase takes and returns."""
    values = {
        node.name: node.meta["val"] for node in program.graph.nodes if node.op in ("placeholder", "call_function")
    }
    given = [str(found) for found in program.graph_signature.user_inputs]
    symbols = input_symbols({name: values[name] for name in given})
    returned = [values[str(found)] for found in program.graph_signature.user_outputs]
    names: Mapping[str, int] = pytree.tree_unflatten(list(range(len(returned))), program.call_spec.out_spec)
    outputs = {name: returned[index] for name, index in names.items()}
    return PhaseSpec(
        name,
        phase,
        tuple(tokens),
        tuple(_spec(name, values[name], symbols) for name in given),
        tuple(_spec(name, value, symbols) for name, value in outputs.items()),
        () if phase == "prefill" or "lengths" in outputs else tuple(name for name in given if name != "input_ids"),
    )


def _phase(told: dict[str, Any]) -> PhaseSpec:
    def specs(name: str) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(**{**spec, "shape": tuple(spec["shape"])}) for spec in told[name])

    tokens = tuple((int(low), int(high)) for low, high in told["tokens"])
    return PhaseSpec(told["name"], told["phase"], tokens, specs("inputs"), specs("outputs"), tuple(told["writes"]))


def input_symbols(inputs: Mapping[str, Any]) -> dict[sympy.Symbol, sympy.Symbol]:
    """Names for the sizes of the inputs: S, C_i for the slots of layer i; of any other input its name and the axis."""
    found: dict[sympy.Symbol, sympy.Symbol] = {}
    for name, value in inputs.items():
        role, _, layer = name.rpartition("_")
        for axis, size in enumerate(getattr(value, "shape", ())):
            if isinstance(size, SYMBOLIC):
                label = f"C_{layer}" if role in ("keys", "values", "positions") else f"{name}_{axis}"
                label = "S" if (name, axis) == ("input_ids", 1) else label
                found.setdefault(size.node.expr, sympy.Symbol(label, integer=True))
    return found


def size_text(size: Any, symbols: Mapping[sympy.Symbol, sympy.Symbol]) -> str:
    """A size in these names: `S//2`."""
    text = str(size.node.expr.xreplace(dict(symbols))) if isinstance(size, SYMBOLIC) else str(size)
    while text.startswith("(") and _closes(text) == len(text) - 1:  # as torch prints a division
        text = text[1:-1]
    return text


def _closes(text: str) -> int:
    """Where the parenthesis at the beginning ends."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return place
    return -1


def _spec(name: str, value: Tensor, symbols: Mapping[sympy.Symbol, sympy.Symbol]) -> TensorSpec:
    role, _, layer = name.rpartition("_")
    shape = tuple(size_text(size, symbols) if isinstance(size, SYMBOLIC) else int(size) for size in value.shape)
    numbered = layer.isdigit()
    dtype = str(value.dtype).removeprefix("torch.")
    return TensorSpec(name, role if numbered else name, int(layer) if numbered else None, dtype, shape)
