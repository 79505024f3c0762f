"""An exported model as Python runs it: the state between calls, and greedy text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kvpass.deployment.manifest import Manifest
from kvpass.errors import CacheError, InputError, PackageError

CACHES = ("keys", "values", "positions")
ROOM = 256  # slots behind the text when nobody said how long it will get


class Runner(Protocol):
    """What a format brings: it runs programs, and knows nothing of texts."""

    def run(self, phase: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs of a phase by name. State that is not among them was updated in place."""


@dataclass
class State:
    """What the phases hand on, and what of it the host must know."""

    tensors: dict[str, Tensor]  # lengths, next_position, keys_0, values_0, ...
    used: list[int]  # slots per layer
    seen: int  # tokens

    @property
    def nbytes(self) -> int:
        """Bytes of the caches, free slots included."""
        return sum(tensor.nbytes for name, tensor in self.tensors.items() if _is_cache(name))


class DeployedModel:
    """What `kvpass.load` makes of a package that `CompiledModel.export` wrote."""

    def __init__(self, manifest: Manifest, runner: Runner) -> None:
        self.manifest = manifest
        self._runner = runner

    def prefill(self, input_ids: Tensor, *, room: int = ROOM) -> tuple[Tensor, State]:
        """Read a prompt i64[B, S]: the logits [B, 1, V] of its last token, and what is kept of it.

        `room`: slots for tokens to come; more are made when they are needed. Raises `InputError` for another batch
        size and `PackageError` for a longer prompt than the package was exported for.
        """
        tokens = self._checked(input_ids)
        phase = self.manifest.phase(tokens, empty=True)
        if phase.phase != "prefill":  # too short for the press: kept whole
            state = self._empty(tokens + room)
            return self.append(input_ids, state)[:, -1:], state
        outputs = self._runner.run(phase.name, {"input_ids": input_ids})
        logits = outputs.pop("logits")
        outputs = {name: tensor for name, tensor in outputs.items() if not name.startswith("kept")}
        used: list[int] = outputs["lengths"].amax(dim=1).tolist()
        state = State(outputs, used, tokens)
        self._resize(state, room)
        return logits, state

    def append(self, input_ids: Tensor, state: State) -> Tensor:
        """Read more tokens i64[B, S] behind what the state holds, which is updated; their logits [B, S, V]."""
        tokens = self._checked(input_ids)
        phase = self.manifest.phase(tokens, empty=False)
        if state.seen + tokens > self.manifest.max_tokens:
            raise InputError(
                f"the text is {state.seen + tokens} tokens long, positions end at {self.manifest.max_tokens}"
            )
        if any(self._slots(state, layer) < state.used[layer] + tokens for layer in self._growing()):
            self._resize(state, max(tokens, ROOM, max(state.used) // 8))
        outputs = self._runner.run(phase.name, {"input_ids": input_ids, **state.tensors})
        logits = outputs.pop("logits")
        state.tensors.update(outputs)
        state.used = [count + tokens for count in state.used]
        state.seen += tokens
        return logits

    def generate(
        self, input_ids: Tensor, max_new_tokens: int = 20, *, eos_token_id: int | Sequence[int] | None = None
    ) -> Tensor:
        """The ids i64[B, S] and the likeliest ones behind them, until all rows have ended.

        eos_token_id: what ends a row, by default what the model's config says. Rows that have ended repeat it.
        """
        given = self.manifest.eos_token_ids if eos_token_id is None else eos_token_id
        ends = torch.tensor([given] if isinstance(given, int) else list(given), dtype=torch.int64)
        ends = ends.to(input_ids.device)
        logits, state = self.prefill(input_ids, room=max_new_tokens)
        ids, ended = [input_ids], torch.zeros(len(input_ids), 1, dtype=torch.bool, device=input_ids.device)
        for count in range(max_new_tokens):
            token = logits[:, -1:].argmax(dim=-1)
            if len(ends):
                token = torch.where(ended, ends[0], token)
                ended = ended | torch.isin(token, ends)
            ids.append(token)
            if count + 1 == max_new_tokens or (len(ends) and bool(ended.all())):
                break
            logits = self.append(token, state)
        return torch.cat(ids, dim=1)

    # -- the buffers -------------------------------------------------------------------------------------------

    def _checked(self, input_ids: Tensor) -> int:
        rows = self.manifest.batch_size
        if input_ids.dim() != 2 or len(input_ids) != rows or not input_ids.shape[1] or input_ids.dtype != torch.int64:
            raise InputError(
                f"input_ids are {input_ids.dtype} {tuple(input_ids.shape)}, this package takes int64 [{rows}, tokens]; "
                "export it with another batch_size="
            )
        return int(input_ids.shape[1])

    def _growing(self) -> list[int]:
        """The layers that store every token."""
        return [i for i, layer in enumerate(self.manifest.layers) if layer.ring is None and layer.reads is None]

    def _slots(self, state: State, layer: int) -> int:
        return int(state.tensors[f"keys_{layer}"].shape[2])

    def _resize(self, state: State, room: int) -> None:
        """Give every layer `room` slots behind those in use."""
        for layer in self._growing():
            used = state.used[layer]
            for name in [f"{role}_{layer}" for role in CACHES if f"{role}_{layer}" in state.tensors]:
                old = state.tensors.pop(name)
                new = old.new_zeros(*old.shape[:2], used + room, *old.shape[3:])
                new[:, :, :used] = old[:, :, :used]
                state.tensors[name] = new

    def _empty(self, slots: int) -> State:
        """Caches of `slots`, where the package does not say how many there are."""
        manifest = self.manifest
        layers, rows = len(manifest.layers), manifest.batch_size
        tensors = {
            "lengths": torch.zeros(layers, rows, dtype=torch.int64, device=manifest.device),
            "next_position": torch.zeros(rows, dtype=torch.int64, device=manifest.device),
        }
        for port in manifest.phases[-1].inputs:
            if port.role in CACHES:
                shape = [slots if isinstance(size, str) else size for size in port.shape]
                tensors[port.name] = torch.zeros(shape, dtype=getattr(torch, port.dtype), device=manifest.device)
        return State(tensors, [0] * layers, 0)


class GuardedModel(DeployedModel):
    """A package of one program that decides itself; single tokens come with padding."""

    def prefill(self, input_ids: Tensor, *, room: int = ROOM) -> tuple[Tensor, State]:
        """As `DeployedModel.prefill`; the capacity is that of the package, whatever `room` is."""
        self._checked(input_ids)
        state = self._empty(0)
        logits = self.append(input_ids, state)
        state.used = state.tensors["lengths"].amax(dim=1).tolist()
        return logits, state

    def append(self, input_ids: Tensor, state: State) -> Tensor:
        """As `DeployedModel.append`, but the logits [B, 1, V] are those of the last token alone."""
        tokens = self._checked(input_ids)
        program = self.manifest.phases[0]
        shortest, longest = program.tokens[0][0], program.tokens[-1][1]
        if tokens > longest:
            raise PackageError(f"{tokens} tokens at once, this package was exported for up to {longest}")
        given = max(tokens, shortest)
        for layer in self._growing() if state.seen or given > tokens else ():
            if (needed := state.used[layer] + given) > (slots := self._slots(state, layer)):
                raise CacheError(f"layer {layer} holds {slots} entries, {needed} are needed; export with capacity=")
        padded = torch.nn.functional.pad(input_ids, (0, given - tokens))
        new_tokens = torch.full((len(input_ids),), tokens, device=input_ids.device)
        outputs = self._runner.run(program.name, {"input_ids": padded, "new_tokens": new_tokens, **state.tensors})
        logits = outputs.pop("logits")
        state.tensors.update(outputs)
        state.used = [count + tokens for count in state.used]
        state.seen += tokens
        return logits


def _is_cache(name: str) -> bool:
    return name.rpartition("_")[0] in CACHES
