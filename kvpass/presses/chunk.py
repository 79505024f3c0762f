"""Every stretch of the text keeps its share. From FINCH, https://doi.org/10.1162/tacl_a_00716"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvpass.budget import Budget, Prompt
from kvpass.errors import MissingTapError, PressError
from kvpass.press import Press, ScorerPress, SelectingPress, Wrapper
from kvpass.press_inputs import PressInputs
from kvpass.presses.nesting import expect_scorer
from kvpass.registry import register_press
from kvpass.selection import best


@register_press("chunk")
@dataclass(frozen=True)
class Chunk(Wrapper, SelectingPress):
    """Keeps the best pairs of every `chunk_length` tokens, scored by the inner press as if each were a text.

    Queries, keys and rotations of a chunk are those of its own tokens. A last chunk that is too short for the inner
    press (its window, its sinks) is kept whole. Prompts of one chunk go to the inner press alone.
    """

    chunk_length: int = 1024

    def __post_init__(self) -> None:
        expect_scorer(self.name, self.press, "chunks are scored one by one")
        if self.press.per_layer:
            raise PressError(f"chunk: {self.press.name} has a budget per layer, which a chunk has no use for")
        if self.chunk_length < self.press.min_tokens:
            raise PressError(
                f"chunk: chunk_length={self.chunk_length}, {self.press.name} needs at least {self.press.min_tokens}"
            )

    @property
    def min_tokens(self) -> int:
        return self.chunk_length + 1

    def fits(self, prompt: Prompt) -> bool:
        return self.press.fits(prompt)

    def for_prompt(self, prompt: Prompt) -> Press:
        """Whole chunks and a rest of 1 to chunk_length tokens; a rest that stays whole is a graph of its own."""
        if prompt.tokens <= self.chunk_length:
            return self.press.for_prompt(prompt)
        inner = self.press.for_prompt(self._part(prompt, self.chunk_length))
        rest = self._part(prompt, self._rest(prompt.tokens))
        return _Chunks(inner, self.chunk_length, inner.fits(rest))

    def _rest(self, tokens: int) -> int:
        return (tokens - 1) % self.chunk_length + 1

    def _part(self, prompt: Prompt, tokens: int) -> Prompt:
        return _part_of(prompt, tokens)

    def sizes(self, prompt: Prompt) -> dict[str, int]:
        return self.for_prompt(prompt).sizes(prompt)

    def keep(self, x: PressInputs) -> Tensor:
        chosen = self.for_prompt(Prompt(int(x.keys.shape[2]), Budget(0.5)))
        assert isinstance(chosen, SelectingPress)
        return chosen.keep(x)


@dataclass(frozen=True)
class _Chunks(Chunk):
    """`Chunk` for prompts of more than one chunk."""

    scores_rest: bool = True

    @property
    def example_tokens(self) -> int:
        rest = min(self.press.example_tokens, self.chunk_length) if self.scores_rest else 1
        return 2 * self.chunk_length + rest

    def for_prompt(self, prompt: Prompt) -> Press:
        return self

    def sizes(self, prompt: Prompt) -> dict[str, int]:
        rest = self._rest(prompt.tokens)
        chunks = (prompt.tokens - rest) // self.chunk_length
        whole = self.press.sizes(_part_of(prompt, self.chunk_length))
        last = self.press.sizes(_part_of(prompt, rest)) if self.scores_rest else {"budget": rest}
        return {
            "budget": chunks * whole["budget"] + last["budget"],
            **{f"chunk_{name}": size for name, size in whole.items()},
            **({f"rest_{name}": size for name, size in last.items()} if self.scores_rest else {}),
        }

    def smallest(self) -> dict[str, int]:
        return {f"{part}_{name}": low for part in ("chunk", "rest") for name, low in self.press.smallest().items()}

    def scalars(self, prompt: Prompt) -> dict[str, float]:
        return self.press.scalars(_part_of(prompt, self.chunk_length))

    def keep(self, x: PressInputs) -> Tensor:
        tokens = x.keys.shape[2]
        chunks = (tokens - 1) // self.chunk_length
        whole = chunks * self.chunk_length
        kept = self._best(_shown(x, "chunk", lambda t, axis: _folded(t, axis, chunks, self.chunk_length)))
        folded = kept.unflatten(0, (x.keys.shape[0], chunks)).transpose(1, 2).flatten(2, 3)
        if self.scores_rest:
            rest = self._best(_shown(x, "rest", lambda t, axis: t.narrow(axis, whole, tokens - whole)))
        else:
            rest = torch.ones_like(x.keys[:, :, whole:, 0], dtype=torch.bool)
        return torch.cat([folded, rest], dim=2)

    def _best(self, x: PressInputs) -> Tensor:
        assert isinstance(self.press, ScorerPress)
        return best(self.press.score(x), x.budget)


def _part_of(prompt: Prompt, tokens: int) -> Prompt:
    """A chunk as a prompt of its own; of a target size it gets its share."""
    budget = prompt.budget
    if budget.target_size is not None:
        budget = Budget(ratio=1 - prompt.kept / prompt.tokens)
    return Prompt(tokens, budget, prompt.layer, prompt.layers)


def _folded(states: Tensor, axis: int, chunks: int, length: int) -> Tensor:
    """Chunks as rows of the batch: [B, heads, S, D] -> [B * P, heads, c, D], [B, S, D] -> [B * P, c, D]."""
    parts = states.narrow(axis, 0, chunks * length).unflatten(axis, (chunks, length))
    rows: Tensor = parts.movedim(axis, 1).flatten(0, 1)
    return rows


def _shown(x: PressInputs, part: str, view: Any) -> PressInputs:
    """What the inner press sees of a chunk; tensors without a token axis stay as they are."""
    taps: dict[str, Tensor | MissingTapError] = {}
    for name, tap in x.taps.items():
        has_tokens = isinstance(tap, Tensor) and not name.startswith("asset.") and name != "output_weight"
        taps[name] = view(tap, 1 if name == "hidden_states" else 2) if has_tokens else tap
    return x.part(f"{part}_").replace(taps, scalars=x.scalars, next_position=x.next_position)
