"""Batches whose rows differ in length: what is padding never reaches a graph that compresses."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kvpass.errors import InputError


@dataclass(frozen=True)
class Rows:
    """A batch without its padding.

    tokens: the ids i64[B, S] or embeddings [B, S, D_model] of each row from the left, anything behind them. counts:
    [B], how many they are. questions: [B], how many of them, at the end, ask about the others. place: i64[B, columns],
    where the tokens of the caller's columns went, padding to the token in front of it; None: every column to its own
    place. positions: i64[axes, B, S] of embeddings, None: counted.
    """

    tokens: Tensor
    counts: tuple[int, ...]
    questions: tuple[int | None, ...]
    place: Tensor | None = None
    positions: Tensor | None = None

    @property
    def embedded(self) -> bool:
        """Whether the tokens are embeddings."""
        return self.tokens.dim() == 3

    @property
    def alike(self) -> bool:
        """Whether all rows have the same number of tokens."""
        return len(set(self.counts)) == 1

    @property
    def next_positions(self) -> list[int] | None:
        """Behind the greatest position of each row; None: they are counted."""
        if self.positions is None:
            return None
        step = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        real = step < torch.tensor(self.counts, device=self.tokens.device)[:, None]
        found: list[int] = (self.positions.masked_fill(~real, -1).amax(dim=(0, 2)) + 1).tolist()
        return found

    def groups(self) -> Iterator[tuple[slice, int, int | None]]:
        """Neighbouring rows that are alike: which, with how many tokens, how many of them a question."""
        sizes = list(zip(self.counts, self.questions, strict=True))
        first = 0
        for row in range(1, len(sizes) + 1):
            if row == len(sizes) or sizes[row] != sizes[first]:
                yield slice(first, row), *sizes[first]
                first = row

    def as_given(self, values: Tensor) -> Tensor:
        """Values [B, S, V] of the tokens in the caller's columns."""
        if self.place is None:
            return values
        return values.gather(1, self.place[..., None].expand(-1, -1, values.shape[2]))


def without_padding(tokens: Tensor, mask: Tensor | None, positions: Tensor | None = None) -> Rows:
    """Bring the tokens where `mask` [B, S] is not 0 to the left. Raises `InputError` for a row without any.

    A mask is looked at on the host, one synchronisation; `generate` gives none for single tokens.
    """
    batch, columns = tokens.shape[:2]
    none: tuple[int | None, ...] = (None,) * batch
    if mask is None:
        return Rows(tokens, (columns,) * batch, none, positions=positions)
    real = mask != 0
    counts = real.sum(dim=1)
    found = tuple(counts.tolist())
    if min(found) == columns:
        return Rows(tokens, found, none, positions=positions)
    if min(found) == 0:
        empty = [row for row, count in enumerate(found) if not count]
        raise InputError(f"rows {empty} are nothing but padding; leave them out of the batch")
    order = torch.argsort((~real).to(torch.int8), dim=1, stable=True)[:, : max(found)]  # tokens first, in their order
    row = torch.arange(batch, device=tokens.device)[:, None]
    if positions is not None:
        positions = positions[:, row, order]
    place = (real.cumsum(dim=1) - 1).clamp(min=0)
    return Rows(tokens[row, order].contiguous(), found, none, place, positions)
