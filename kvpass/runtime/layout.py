"""What a cache stores per layer, and how far a text in it reaches."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from kvpass.errors import CacheError

GRANULE = 64  # capacities grow in steps of at least this many slots


@dataclass(frozen=True)
class LayerLayout:
    """What one layer stores per batch row."""

    heads: int  # Hkv
    key_size: int
    value_size: int
    dtype: str  # of torch, without the prefix: "float32"
    pressed: bool
    ring: int | None = None  # slots of a layer of windows or chunks: token p lies in slot p % ring
    tracks_positions: bool = False  # whether its graph reads where in the text an entry was (ALiBi)
    reads: int | None = None  # the layer whose keys and values it reads; it stores none then

    def buffers(self, batch: int, capacity: int, device: torch.device) -> tuple[Tensor, ...]:
        """Empty storage: keys and values [B, Hkv, C, D], and positions i64[B, Hkv, C] if it tracks them."""
        if self.reads is not None:
            return ()
        slots = (batch, self.heads, capacity)
        dtype = getattr(torch, self.dtype)
        found = [torch.zeros(*slots, size, dtype=dtype, device=device) for size in (self.key_size, self.value_size)]
        if self.tracks_positions:
            found.append(torch.zeros(slots, dtype=torch.int64, device=device))
        return tuple(found)


@dataclass(frozen=True)
class CacheLayout:
    """What a model stores, and which model it is."""

    layers: tuple[LayerLayout, ...]
    model_id: str
    capacity: int | None = None  # slots per layer that are never exceeded; None: grows as needed
    whole_rings: bool = False  # whether rings have all their slots from the start

    def holder(self, layer: int) -> int:
        """The layer that stores what this one reads: itself, or the one whose keys it shares."""
        reads = self.layers[layer].reads
        return layer if reads is None else reads

    @property
    def holders(self) -> tuple[int, ...]:
        """The layers that store something."""
        return tuple(index for index, layer in enumerate(self.layers) if layer.reads is None)

    def slots(self, layer: LayerLayout, entries: int) -> int:
        """How many slots to allocate where `entries` are needed. Raises `CacheError` beyond the fixed capacity."""
        if layer.ring is not None:
            if self.whole_rings:
                return layer.ring
            entries = min(entries, layer.ring)
        if self.capacity is not None:
            if entries > self.capacity:
                raise CacheError(
                    f"the cache holds {self.capacity} entries per layer, {entries} are needed; compile with a greater "
                    "capacity=, with capacity=None (grows as needed), or with a greater ratio"
                )
            return self.capacity if layer.ring is None else min(self.capacity, layer.ring)
        room = entries + max(256, entries // 8)
        # Off the round numbers that prompts and budgets have: torch.compile takes equal sizes for one size.
        room = -(-room // GRANULE) * GRANULE + (8 if layer.pressed else 24)
        return room if layer.ring is None else min(room, layer.ring)


@dataclass(frozen=True)
class Extent:
    """How far each row of a cache reaches."""

    columns: int = 0  # of the caller's text, padding and delimiters included
    whole: int = 0  # from this column on every row has a token in each, its positions counted one by one
    seen: tuple[int, ...] = ()  # [B], tokens that each row has read
    next: tuple[int, ...] = ()  # [B], the position of the next token: `seen`, but where keys or positions were moved

    @property
    def longest(self) -> int:
        return max(self.seen, default=0)

    def grown(self, columns: int, tokens: Sequence[int], next_positions: Sequence[int] | None = None) -> Self:
        """Behind so many more columns and tokens, at positions that are counted unless the next ones are given."""
        counted = min(tokens) == columns and next_positions is None
        following = next_positions or [a + b for a, b in zip(self.next, tokens, strict=True)]
        return replace(
            self,
            columns=self.columns + columns,
            whole=self.whole if counted else self.columns + columns,
            seen=tuple(a + b for a, b in zip(self.seen, tokens, strict=True)),
            next=tuple(following),
        )

    def selected(self, rows: Sequence[int]) -> Self:
        return replace(self, seen=tuple(self.seen[r] for r in rows), next=tuple(self.next[r] for r in rows))

    @classmethod
    def empty(cls, batch: int) -> Self:
        return cls(seen=(0,) * batch, next=(0,) * batch)


@dataclass(frozen=True)
class Context:
    """What the prefill left."""

    extent: Extent = Extent()
    entries: tuple[tuple[int, ...], ...] = ()  # [L][B], slots in use; of a ring, tokens seen

    def selected(self, rows: Sequence[int]) -> "Context":
        return Context(self.extent.selected(rows), tuple(tuple(layer[row] for row in rows) for layer in self.entries))

    @classmethod
    def of_plain_text(cls, extent: Extent, layers: int) -> "Context":
        """Where every layer holds all that was seen."""
        return cls(extent, (extent.seen,) * layers)
