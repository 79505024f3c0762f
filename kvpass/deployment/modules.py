"""Phase graphs as modules that count for themselves: what torch.export traces."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kvpass.budget import Prompt
from kvpass.deployment.counts import Line, Table, rule
from kvpass.deployment.loops import retraceable
from kvpass.errors import PackageError
from kvpass.ir.program import STORED, KVProgram, Port, Role
from kvpass.ir.symbols import Size
from kvpass.prompts import Prompts
from kvpass.runtime.layout import CacheLayout

Named = dict[str, Tensor]
COUNTED = (Role.SIZE, Role.SCALAR)  # what the host counts for a press


class Code(nn.Module):
    """The graph's code and tensors, under their names, in a module that torch.export does not take for a graph."""

    def __init__(self, program: KVProgram) -> None:
        super().__init__()
        held = retraceable(program).graph_module
        self._parameters.update(held._parameters)
        self._buffers.update(held._buffers)
        self._modules.update(held._modules)
        self._code = type(held).forward
        self.device: torch.device = program.token_node().meta["val"].device

    def run(self, *inputs: Tensor) -> Sequence[Tensor]:
        """The values of the program's outputs."""
        outputs: Sequence[Tensor] = self._code(self, *inputs)
        return outputs


class Prefill(Code):
    """A functional prefill graph; its input is the prompt alone."""

    def __init__(self, program: KVProgram, layout: CacheLayout, prompts: Prompts, batch_size: int) -> None:
        super().__init__(program)
        self._program, self._layout, self._batch = program, layout, batch_size
        self._counted = _Counted(self, program, prompts)

    def forward(self, input_ids: Tensor) -> Named:
        """ids i64[B, S] -> logits [B, 1, V], lengths, next_position, the caches as long as what is kept, kept_i"""
        tokens = input_ids.shape[1]
        positions = torch.arange(tokens, device=self.device).expand(self._batch, tokens)
        inputs = [
            self._counted.value(port, tokens) if port.role in COUNTED else _token(port, input_ids, positions)
            for port in self._program.inputs
        ]
        found = dict(zip(self._program.outputs, self.run(*inputs), strict=True))
        held = {(port.role, port.layer): value for port, value in found.items()}
        lengths = torch.stack([self._used(held, layer, tokens) for layer in range(self._program.layer_count)])
        named = {_name(port): value for port, value in found.items() if port.role is not Role.COUNT}
        state = {"lengths": lengths, "next_position": self._full(self._counted.following(tokens))}
        return {"logits": named.pop("logits"), **state, **named}

    def _used(self, held: dict[tuple[Role, int | None], Tensor], layer: int, tokens: int) -> Tensor:
        """Slots in use, i64[B]"""
        holder = self._layout.holder(layer)
        if (Role.COUNT, holder) in held:
            return held[Role.COUNT, holder]
        ring = self._layout.layers[holder].ring is not None
        return self._full(tokens if ring else held[Role.KEYS, holder].shape[2])

    def _full(self, size: Any) -> Tensor:
        return torch.full((self._batch,), size, dtype=torch.int64, device=self.device)


class Step(Code):
    """An extend or decode graph over the state that the call before it left."""

    def __init__(self, program: KVProgram, batch_size: int, *, functional: bool) -> None:
        super().__init__(program)
        self._program, self._batch, self._functional = program, batch_size, functional
        self.stored = [port for port in program.inputs if port.role in STORED]
        self.decodes = program.input_node(Role.INPUT_IDS).meta["val"].shape[1] == 1

    def forward(self, input_ids: Tensor, lengths: Tensor, next_position: Tensor, *caches: Tensor) -> Named:
        """ids i64[B, S] -> logits [B, S, V], and the state if it is not updated in place"""
        new = torch.full((self._batch,), input_ids.shape[1], dtype=torch.int64, device=self.device)
        return self.append(input_ids, new, lengths, next_position, *caches)

    def append(
        self, input_ids: Tensor, new_tokens: Tensor, lengths: Tensor, next_position: Tensor, *caches: Tensor
    ) -> Named:
        """Of the ids, the first `new_tokens` i64[B] are meant."""
        positions = next_position[:, None] + torch.arange(input_ids.shape[1], device=self.device)
        given = dict(zip((port.name for port in self.stored), caches, strict=True))
        given |= {"lengths": lengths, "new_tokens": new_tokens}
        inputs = [
            given[port.name] if port.name in given else _token(port, input_ids, positions)
            for port in self._program.inputs
        ]
        named = {_name(port): value for port, value in zip(self._program.outputs, self.run(*inputs), strict=True)}
        logits = named.pop("logits")
        if not self._functional:
            lengths.add_(new_tokens)
            next_position.add_(new_tokens)
            return {"logits": logits}
        state = {"lengths": lengths + new_tokens, "next_position": next_position + new_tokens}
        return {"logits": logits, **state, **named}


class Given(Code):
    """A functional graph as kvpass runs it: positions, lengths and caches are given, the press counts inside."""

    def __init__(self, program: KVProgram, prompts: Prompts | None) -> None:
        super().__init__(program)
        self._program = program
        read = {str(node.target) for node in program.placeholders() if node.users}
        self.ports = [port for port in program.inputs if port.name in read and port.role not in COUNTED]
        self._counted = None if prompts is None else _Counted(self, program, prompts)

    def forward(self, *inputs: Tensor) -> Named:
        """What `ports` say -> what the program leaves, by name"""
        given = dict(zip((port.name for port in self.ports), inputs, strict=True))
        tokens = given[str(self._program.token_node().target)].shape[1]
        outputs = self.run(*(self._value(port, given, tokens) for port in self._program.inputs))
        return dict(zip((port.name for port in self._program.outputs), outputs, strict=True))

    def _value(self, port: Port, given: Named, tokens: Size) -> Tensor:
        if port.role in COUNTED:
            assert self._counted is not None
            return self._counted.value(port, tokens)
        return given[port.name] if port.name in given else torch.empty(0)  # which nobody reads


class _Counted:
    """The sizes and scalars of a press as functions of S, with the tables they need as buffers of the module."""

    def __init__(self, module: Code, program: KVProgram, prompts: Prompts) -> None:
        self._module, self._prompts, self._layers = module, prompts, program.layer_count
        press, device = prompts.press, module.device
        self._rules: dict[tuple[int, str], Line | Table] = {}
        for port in program.inputs:
            if press is None or port.role not in COUNTED:
                continue
            key = self._key(port)
            if key not in self._rules and port.role is Role.SIZE:
                self._add(key, [press.sizes(prompt)[port.key] for prompt in self._prompts_of(key[0])])
            elif port.role is Role.SCALAR:
                values = [press.scalars(prompt)[port.key] for prompt in self._prompts_of(key[0])]
                table = torch.zeros(prompts.tokens[-1] + 1, device=device)
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
