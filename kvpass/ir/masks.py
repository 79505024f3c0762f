"""Which tokens see which: the attention masks that kvpass knows, as plain tensor code (True: attend)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Causal:
    """A token sees itself and all before it."""

    reach: ClassVar[int | None] = None  # the most tokens that one token sees; None: all

    def allowed(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether tokens number `query` see tokens number `key`; i64 of any shapes that broadcast."""
        return key <= query

    def __str__(self) -> str:
        return "causal"


@dataclass(frozen=True)
class Sliding(Causal):
    """A token sees the last `reach` tokens, itself included."""

    reach: int  # type: ignore[misc]

    def allowed(self, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key > query - self.reach)

    def __str__(self) -> str:
        return f"window {self.reach}"


@dataclass(frozen=True)
class Chunked(Causal):
    """A token sees itself and those before it in its own chunk of `reach` tokens."""

    reach: int  # type: ignore[misc]

    def allowed(self, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key // self.reach == query // self.reach)

    def __str__(self) -> str:
        return f"chunk {self.reach}"


def prompt_mask(kind: Causal, tokens: int, device: torch.device) -> Tensor:
    """What the tokens of a prompt see of one another. bool[S, S]"""
    key = torch.arange(tokens, device=device)
    return kind.allowed(key[:, None], key)


def classify(allowed: Tensor) -> Causal | None:
    """The mask that bool[heads, S, S] shows; None: another one. A reach beyond S does not show."""
    length = allowed.shape[-1]
    candidates = [Causal(), Sliding(int(allowed[0, -1].sum()))]
    unseen = (~allowed[0, :, 0]).nonzero().flatten()  # by which tokens the first one is not seen
    if len(unseen):
        candidates.append(Chunked(int(unseen[0])))
    for kind in candidates:
        if kind.reach != 0 and bool((allowed == prompt_mask(kind, length, allowed.device)).all()):
            return kind
    return None


def ring_positions(newest: Tensor, slots: int, reach: int) -> Tensor:
    """Which token lies in each slot of a ring of `reach` slots whose newest token is number `newest`.

    newest i64[B], i64[B, slots]; negative: the slot is empty yet. Token p lies in slot p % reach, slots <= reach.
    """
    slot = torch.arange(slots, device=newest.device)
    return newest[:, None] - (newest[:, None] - slot) % reach
