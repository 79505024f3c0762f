"""The phases of a compiled model as programs of torch.export that count for themselves.

A deployed phase takes token ids and the state that the one before it left, and nothing else:

    prefill(input_ids)                                    -> logits [B, 1, V], state, the positions that were kept
    extend(input_ids, lengths, next_position, caches...)  -> logits [B, S, V], state
    decode(input_ids, lengths, next_position, caches...)  -> logits [B, 1, V], state

State is `lengths` i64[L, B] (slots in use per layer; of a ring, tokens seen), `next_position` i64[B], and the caches of
each layer. A prefill returns caches as long as what it kept; whoever runs it puts them into buffers with room. The
other phases write to the state, or return it if they are functional.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

from kvpass.budget import Budget, Prompt
from kvpass.deployment.counts import Line, Table, rule
from kvpass.errors import PackageError
from kvpass.ir.program import STORED, KVProgram, Port, Role
from kvpass.ir.symbols import Size
from kvpass.press import Press
from kvpass.runtime.layout import CacheLayout

CAPACITY = (
    1031  # slots of the first layer in the example; each layer has others, so that no two sizes are taken for one
)
Named = dict[str, Tensor]


@dataclass(frozen=True)
class Prompts:
    """The prompts that one prefill graph is for."""

    press: Press | None
    budget: Budget
    tokens: tuple[int, ...]  # ascending

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """First and last length of each run of lengths."""
        known = set(self.tokens)
        starts = [n for n in self.tokens if n - 1 not in known]
        return list(zip(starts, [n for n in self.tokens if n + 1 not in known], strict=True))


def prompts_of(press: Press | None, budget: Budget, layers: int, longest: int) -> list[Prompts]:
    """Which press compresses prompts of which length, up to `longest`; any others are kept whole by extend.

    Raises `PackageError` if the press asks for more than the token ids, or compresses none of them.
    """
    if press is None:
        return [Prompts(None, budget, tuple(range(2, longest + 1)))]
    if press.needs_question:
        raise PackageError(
            f"{press.name} must be told which tokens are the question, which no exported graph is; export with another "
            "press, or save() the model and let kvpass run it"
        )
    found: dict[Press, list[int]] = {}
    for tokens in range(2, longest + 1):
        prompt = Prompt(tokens, budget, 0, layers)
        if press.fits(prompt):
            found.setdefault(press.for_prompt(prompt), []).append(tokens)
    if not found:
        raise PackageError(f"{press.name} compresses no prompt of up to {longest} tokens; raise max_tokens")
    return [Prompts(chosen, budget, tuple(tokens)) for chosen, tokens in found.items()]


def export_prefill(program: KVProgram, layout: CacheLayout, prompts: Prompts, *, batch_size: int) -> ExportedProgram:
    """The functional prefill graph as a program of the ids alone."""
    module = _Code(program)
    run, counted = module.run, _Counted(module, program, prompts)

    def prefill(input_ids: Tensor) -> Named:
        tokens = input_ids.shape[1]
        positions = torch.arange(tokens, device=input_ids.device).expand(batch_size, tokens)
        inputs = [
            counted.value(port, tokens) if port.role in (Role.SIZE, Role.SCALAR) else _token(port, input_ids, positions)
            for port in program.inputs
        ]
        found = dict(zip(program.outputs, run(*inputs), strict=True))
        held = {(port.role, port.layer): value for port, value in found.items()}

        def full(size: Any) -> Tensor:
            return torch.full((batch_size,), size, dtype=torch.int64, device=input_ids.device)

        def used(layer: int) -> Tensor:
            holder = layout.holder(layer)
            if (Role.COUNT, holder) in held:
                return held[Role.COUNT, holder]
            return full(tokens if layout.layers[holder].ring is not None else held[Role.KEYS, holder].shape[2])

        lengths = torch.stack([used(layer) for layer in range(program.layer_count)])
        named = {_name(port): value for port, value in found.items() if port.role is not Role.COUNT}
        state = {"lengths": lengths, "next_position": full(counted.following(tokens))}
        return {"logits": named.pop("logits"), **state, **named}

    shortest, longest = prompts.tokens[0], prompts.tokens[-1]
    example = [n for n in prompts.tokens if n >= 2 * shortest + 61] or [longest]
    ids = torch.zeros(batch_size, example[0], dtype=torch.int64, device=_device(program))
    return _exported(module, prefill, {"input_ids": (ids, {1: Dim.DYNAMIC(min=shortest, max=longest)})})


def export_step(
    program: KVProgram, layout: CacheLayout, *, batch_size: int, longest: int, functional: bool
) -> ExportedProgram:
    """The extend or decode graph as a program of ids and state."""
    module = _Code(program)
    run, device = module.run, _device(program)
    stored = [port for port in program.inputs if port.role in STORED]

    def step(input_ids: Tensor, lengths: Tensor, next_position: Tensor, *caches: Tensor) -> Named:
        tokens = input_ids.shape[1]
        positions = next_position[:, None] + torch.arange(tokens, device=device)
        given = dict(zip((port.name for port in stored), caches, strict=True))
        given |= {"lengths": lengths, "new_tokens": torch.full((batch_size,), tokens, device=device)}
        inputs = [
            given[port.name] if port.name in given else _token(port, input_ids, positions) for port in program.inputs
        ]
        named = {_name(port): value for port, value in zip(program.outputs, run(*inputs), strict=True)}
        logits = named.pop("logits")
        if not functional:
            lengths.add_(tokens)
            next_position.add_(tokens)
            return {"logits": logits}
        return {"logits": logits, "lengths": lengths + tokens, "next_position": next_position + tokens, **named}

    decodes = program.input_node(Role.INPUT_IDS).meta["val"].shape[1] == 1
    ids = torch.zeros(batch_size, 1 if decodes else 67, dtype=torch.int64, device=device)
    layers = program.layer_count
    examples: dict[str, tuple[Tensor, dict[int, object]]] = {
        "input_ids": (ids, {} if decodes else {1: Dim.DYNAMIC(min=2, max=longest)}),
        "lengths": (torch.zeros(layers, batch_size, dtype=torch.int64, device=device), {}),
        "next_position": (torch.zeros(batch_size, dtype=torch.int64, device=device), {}),
    }
    for port in stored:
        assert port.layer is not None
        ring = layout.layers[port.layer].ring
        buffers = layout.layers[port.layer].buffers(batch_size, ring or CAPACITY + port.layer, device)
        examples[port.name] = (buffers[STORED.index(port.role)], {} if ring else {2: Dim.DYNAMIC})
    return _exported(module, step, examples)


class _Code(nn.Module):
    """The graph's code and tensors, under their names, in a module that torch.export does not take for a graph."""

    def __init__(self, program: KVProgram) -> None:
        super().__init__()
        held = program.graph_module
        self._parameters.update(held._parameters)
        self._buffers.update(held._buffers)
        self._modules.update(held._modules)
        self._code = type(held).forward

    def run(self, *inputs: Tensor) -> Sequence[Tensor]:
        """The values of the program's outputs."""
        outputs: Sequence[Tensor] = self._code(self, *inputs)
        return outputs


class _Counted:
    """The sizes and scalars of a press as functions of S, with the tables they need as buffers of the module."""

    def __init__(self, module: nn.Module, program: KVProgram, prompts: Prompts) -> None:
        self._module, self._prompts, self._layers = module, prompts, program.layer_count
        press = prompts.press
        self._rules: dict[tuple[int, str], Line | Table] = {}
        for port in program.inputs:
            if press is None or port.role not in (Role.SIZE, Role.SCALAR):
                continue
            key = self._key(port)
            if key not in self._rules and port.role is Role.SIZE:
                self._add(key, [press.sizes(prompt)[port.key] for prompt in self._prompts_of(key[0])])
            elif port.role is Role.SCALAR:
                values = [press.scalars(prompt)[port.key] for prompt in self._prompts_of(key[0])]
                table = torch.zeros(prompts.tokens[-1] + 1, device=_device(program))
                table[torch.tensor(prompts.tokens)] = torch.tensor(values, device=table.device)
                module.register_buffer(_buffer(key), table)
        if press is not None:
            self._add((0, "next_position"), [press.next_position(prompt) for prompt in self._prompts_of(0)])

    def value(self, port: Port, tokens: Size) -> Tensor:
        """What the graph reads at this input."""
        key = self._key(port)
        if port.role is Role.SCALAR:
            return self._module.get_buffer(_buffer(key))[tokens]
        return torch.empty(self._count(key, tokens))  # its length is all that counts

    def following(self, tokens: Size) -> Size:
        """Where the text goes on."""
        return tokens if self._prompts.press is None else self._count((0, "next_position"), tokens)

    def _count(self, key: tuple[int, str], tokens: Size) -> Size:
        found = self._rules[key]
        return found(tokens) if isinstance(found, Line) else found(tokens, self._module.get_buffer(_buffer(key)))

    def _add(self, key: tuple[int, str], counts: list[int]) -> None:
        found = rule(self._prompts.tokens, counts)
        self._rules[key] = found
        if isinstance(found, Table):
            self._module.register_buffer(_buffer(key), found.counts)

    def _key(self, port: Port) -> tuple[int, str]:
        """Equal for layers of which the same is counted."""
        press = self._prompts.press
        return (port.layer or 0) if press is not None and press.per_layer else 0, port.key

    def _prompts_of(self, layer: int) -> list[Prompt]:
        return [Prompt(tokens, self._prompts.budget, layer, self._layers) for tokens in self._prompts.tokens]


def _buffer(key: tuple[int, str]) -> str:
    return f"counted_{key[1]}_{key[0]}"


def _token(port: Port, input_ids: Tensor, positions: Tensor) -> Tensor:
    """What a graph reads of the tokens: their ids or positions."""
    match port.role:
        case Role.INPUT_IDS:
            return input_ids
        case Role.POSITION_IDS:
            return positions
        case _:
            raise PackageError(f"the graph reads {port.role.value}, which no exported graph is given; save() the model")


def _name(port: Port) -> str:
    """`keys_3` comes in and goes out under one name."""
    return port.role.value if port.layer is None else f"{port.role.value}_{port.layer}"


def _device(program: KVProgram) -> torch.device:
    device: torch.device = program.input_node(Role.INPUT_IDS).meta["val"].device
    return device


def _exported(
    module: nn.Module, forward: Callable[..., Named], examples: Mapping[str, tuple[Tensor, dict[int, object]]]
) -> ExportedProgram:
    """`module` exported as if its code was `forward`, with inputs of these names."""

    def named(*inputs: Tensor) -> Named:
        return forward(*inputs)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    named.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in examples])  # type: ignore[attr-defined]
    module.forward = named
    tensors, axes = zip(*examples.values(), strict=True)
    with torch.no_grad():
        return export(
            module, tensors, dynamic_shapes=axes, strict=False, prefer_deferred_runtime_asserts_over_guards=True
        )
