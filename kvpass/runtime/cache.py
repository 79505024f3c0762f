"""The compressed cache: preallocated, written in place by the graphs, with the text position of every entry."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import Cache

from kvpass.errors import CacheError

GRANULE = 64  # capacities grow in steps of at least this many slots
FORMAT = "kvpass-cache-2"


@dataclass(frozen=True)
class LayerLayout:
    """What one layer stores per batch row."""

    heads: int  # Hkv
    key_size: int
    value_size: int
    dtype: str  # of torch, without the prefix: "float32"
    pressed: bool

    def shapes(self, batch: int, capacity: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (
            (batch, self.heads, capacity, self.key_size),
            (batch, self.heads, capacity, self.value_size),
        )


@dataclass(frozen=True)
class CacheLayout:
    """What a model stores, and which model it is."""

    layers: tuple[LayerLayout, ...]
    model_id: str
    capacity: int | None = None  # slots per layer that are never exceeded; None: grows as needed


class CompressedCache(Cache):
    """Keys and values of all layers, and where in the text each entry comes from.

    `get_seq_length()` and `seen_tokens` count the tokens of the text, `kept(layer)` the entries that are left of
    them. A slot is where an entry lies, a position which token it was.
    """

    is_compileable = False  # keeps transformers from compiling around it
    is_initialized = True

    def __init__(self, layout: CacheLayout, device: torch.device | str) -> None:
        super().__init__(layers=[])
        self.layout = layout
        self.device = torch.device(device)
        self.seen_tokens = 0
        self._rows: int | None = None
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._kept: list[Tensor | None] = [None] * len(layout.layers)  # positions of what the prefill left
        self._used = [0] * len(layout.layers)
        self._context = (0, [0] * len(layout.layers))  # seen_tokens and entries at the end of the prefill
        self._counts: Tensor | None = None  # i64[L, B], entries at the end of the prefill, where rows differ
        self._shift = 0  # how much earlier than its place in the text a new token stands, after a re-rotation
        self._removed = 0  # tokens of the prompt that the model never saw: a delimiter
        self.lengths = torch.empty(0)

    # -- what the graphs read and write ------------------------------------------------------------------------

    def buffers(self, layer: int) -> tuple[Tensor, Tensor]:
        """The whole storage of a layer, free slots included. [B, Hkv, C, D] each"""
        return self._keys[layer], self._values[layer]

    def allocate(self, batch: int, entries: Sequence[int]) -> None:
        """Room for a fresh prefill that leaves `entries[layer]` in each layer."""
        self._rows = batch
        self._keys, self._values = [], []
        with torch.inference_mode(False):
            for layer, need in zip(self.layout.layers, entries, strict=True):
                dtype = getattr(torch, layer.dtype)
                shapes = layer.shapes(batch, self._capacity(need, layer))
                keys, values = (torch.zeros(shape, dtype=dtype, device=self.device) for shape in shapes)
                self._keys.append(keys)
                self._values.append(values)
            self.lengths = torch.zeros(len(entries), batch, dtype=torch.int64, device=self.device)

    def begin(
        self,
        seen_tokens: int,
        kept: Sequence[Tensor | None],
        entries: Sequence[int],
        *,
        counts: Mapping[int, Tensor] | None = None,
        next_position: int | None = None,
    ) -> None:
        """Note what a prefill has written.

        kept[layer]: i64[B, Hkv, n], or None if all of it. entries[layer]: slots written. counts[layer]: i64[B], how
        many of them are occupied in each row, where the press decided; asking for them is one synchronisation.
        next_position: where the text goes on, if not behind the tokens seen.
        """
        self._kept = list(kept)
        self._used = list(entries)
        self.seen_tokens = seen_tokens
        self._shift = seen_tokens - (seen_tokens if next_position is None else next_position)
        self._counts = None
        if counts:
            written = torch.tensor(entries, device=self.device)[:, None].expand_as(self.lengths).clone()
            for layer, count in counts.items():
                written[layer] = count
            self._counts = written
            self._used = [max(row) for row in written.tolist()]
            self._trim()
        self._context = (seen_tokens, list(self._used))
        self._sync_lengths()

    def note_removed(self, tokens: int) -> None:
        """Note that the caller's text holds tokens that the model does not see."""
        self._removed = tokens

    @property
    def next_position(self) -> int:
        """The position of the next token."""
        return self.seen_tokens - self._shift

    def _trim(self) -> None:
        """Give back the room of what was decided to be dropped, where it is worth a copy."""
        for index, layer in enumerate(self.layout.layers):
            if self.layout.capacity is not None:
                return
            used = self._used[index]
            capacity, kept = self._capacity(used, layer), self._kept[index]
            if kept is not None:
                self._kept[index] = kept[:, :, :used]
            if capacity < 0.75 * self._keys[index].shape[2]:
                with torch.inference_mode(False):
                    self._keys[index] = self._resized(self._keys[index], capacity, used)
                    self._values[index] = self._resized(self._values[index], capacity, used)

    def reserve(self, tokens: int) -> None:
        """Make sure that `tokens` more entries fit; grows in steps, so that growth is rare."""
        for index, layer in enumerate(self.layout.layers):
            need = self._used[index] + tokens
            if need > self._keys[index].shape[2]:
                capacity = self._capacity(need, layer)
                with torch.inference_mode(False):
                    self._keys[index] = self._resized(self._keys[index], capacity, self._used[index])
                    self._values[index] = self._resized(self._values[index], capacity, self._used[index])

    def advance(self, tokens: int) -> None:
        """Note that `tokens` entries were appended to every layer."""
        if self.seen_tokens == 0:  # a prompt that was kept whole is the context, as after a prefill
            self._context = (tokens, [tokens] * len(self._used))
        self.seen_tokens += tokens
        self._used = [used + tokens for used in self._used]
        self.lengths += tokens

    def _capacity(self, entries: int, layer: LayerLayout) -> int:
        limit = self.layout.capacity
        if limit is not None:
            if entries > limit:
                raise CacheError(
                    f"the cache holds {limit} entries per layer, {entries} are needed; compile with a greater "
                    "capacity=, with capacity=None (grows as needed), or with a greater ratio"
                )
            return limit
        room = entries + max(256, entries // 8)
        # Off the round numbers that prompts and budgets have: torch.compile takes equal sizes for one size.
        return -(-room // GRANULE) * GRANULE + (8 if layer.pressed else 24)

    def _resized(self, old: Tensor, capacity: int, used: int) -> Tensor:
        batch, heads, _, size = old.shape
        new = old.new_zeros(batch, heads, capacity, size)
        new[:, :, :used] = old[:, :, :used]
        return new

    def _sync_lengths(self) -> None:
        """Set `lengths` to what is in use now."""
        used = torch.tensor(self._used, dtype=torch.int64)
        if self._counts is None:
            self.lengths.copy_(used[:, None].expand_as(self.lengths))
        else:
            appended = used - torch.tensor(self._context[1])
            self.lengths.copy_(self._counts + appended[:, None].to(self.device))

    # -- what people read --------------------------------------------------------------------------------------

    def keys(self, layer: int) -> Tensor:
        """The occupied entries, in position order. [B, Hkv, n, D], a view; n is that of the fullest row"""
        return self._keys[layer][:, :, : self._used[layer]]

    def values(self, layer: int) -> Tensor:
        """The occupied entries, in position order. [B, Hkv, n, D], a view; n is that of the fullest row"""
        return self._values[layer][:, :, : self._used[layer]]

    def positions(self, layer: int) -> Tensor:
        """Which token of the text each entry was; -1 behind the end of a row that holds fewer. i64[B, Hkv, n]"""
        heads, (context, entries) = self.layout.layers[layer].heads, self._context
        kept = self._kept[layer]
        if kept is None:
            kept = torch.arange(entries[layer], device=self.device).expand(self._rows or 0, heads, -1)
        appended = torch.arange(self._used[layer] - entries[layer], device=self.device) + context
        found = torch.cat([kept, appended.expand(*kept.shape[:2], -1)], dim=-1)
        if self._counts is None:
            return found
        slot = torch.arange(found.shape[-1], device=self.device)
        count, length = self._counts[layer][:, None, None], self.lengths[layer][:, None, None]
        found = torch.where(slot < count, found, slot - count + context)
        return torch.where(slot < length, found, -1)

    def kept(self, layer: int) -> int:
        """How many entries each KV head of the layer holds, in the fullest row."""
        return self._used[layer]

    @property
    def batch_size(self) -> int | None:  # type: ignore[override]
        """Rows of the cache; None while it is empty."""
        return self._rows

    @property
    def nbytes(self) -> int:
        """Bytes of storage of keys and values, free slots included."""
        return sum(t.numel() * t.element_size() for t in (*self._keys, *self._values))

    @property
    def used_bytes(self) -> int:
        """Bytes of the occupied entries alone."""
        layers = range(len(self._keys))
        return sum(t.numel() * t.element_size() for i in layers for t in (self.keys(i), self.values(i)))

    def __len__(self) -> int:
        return len(self.layout.layers)

    def __repr__(self) -> str:
        return f"CompressedCache(seen_tokens={self.seen_tokens}, kept={self._used}, nbytes={self.nbytes})"

    # -- going back, copying -----------------------------------------------------------------------------------

    def rewind(self) -> Self:
        """Forget all that came after the context (the first prompt), so that another question can follow it."""
        self.seen_tokens, self._used = self._context[0], list(self._context[1])
        if self._keys:
            self._sync_lengths()
        return self

    def crop(self, max_length: int) -> None:
        """Forget the last tokens until `max_length` are seen (zero or less: that many fewer than now).

        Raises `CacheError` for what lies inside a compressed context: what was dropped does not come back.
        """
        max_length -= self._removed if max_length > 0 else 0
        target = self.seen_tokens + max_length if max_length <= 0 else min(max_length, self.seen_tokens)
        removed = self.seen_tokens - target
        compressed = any(kept is not None for kept in self._kept)
        if target < 0:
            raise CacheError(f"cannot crop {-max_length} tokens, the cache has seen {self.seen_tokens}")
        if compressed and target < self._context[0]:
            raise CacheError(
                f"cannot crop to {target} tokens: the context of {self._context[0]} tokens is compressed; "
                "prefill the shorter text instead"
            )
        self.seen_tokens, self._used = target, [used - removed for used in self._used]
        if target < self._context[0]:
            self._context, self._counts = (target, list(self._used)), None
        if removed:
            self._sync_lengths()

    def reset(self) -> None:
        """Empty the cache."""
        self.__init__(self.layout, self.device)  # type: ignore[misc]

    def copy(self) -> "CompressedCache":
        """An independent cache with the same content."""
        return self._mapped(Tensor.clone)

    def __deepcopy__(self, memo: dict[int, Any]) -> "CompressedCache":
        return self.copy()

    def _mapped(self, change: Any) -> "CompressedCache":
        twin = CompressedCache(self.layout, self.device)
        twin.seen_tokens, twin._used = self.seen_tokens, list(self._used)
        twin._context = (self._context[0], list(self._context[1]))
        twin._shift, twin._removed = self._shift, self._removed
        twin._counts = None if self._counts is None else change(self._counts.T).T.contiguous()
        twin._keys = [change(t) for t in self._keys]
        twin._values = [change(t) for t in self._values]
        twin._kept = [None if t is None else change(t) for t in self._kept]
        twin.lengths = change(self.lengths.T).T.contiguous() if self._keys else self.lengths
        twin._rows = twin._keys[0].shape[0] if twin._keys else None
        return twin

    # -- what transformers calls -------------------------------------------------------------------------------

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of the caller's text, not entries kept: positions go on counting the text."""
        return self.seen_tokens + self._removed

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give row i the content of row `beam_idx[i]` (beam search)."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order."""
        self.__dict__.update(self._mapped(lambda t: t.index_select(0, indices.to(t.device))).__dict__)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self.__dict__.update(self._mapped(lambda t: t.repeat_interleave(repeats, dim=0)).__dict__)

    # -- files -------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the occupied entries to a safetensors file."""
        if not self._keys:
            raise CacheError("an empty cache cannot be saved; prefill it first")
        tensors = {}
        for layer in range(len(self)):
            tensors[f"keys.{layer}"] = self.keys(layer).contiguous()
            tensors[f"values.{layer}"] = self.values(layer).contiguous()
            kept = self._kept[layer]
            if kept is not None:
                tensors[f"kept.{layer}"] = kept.contiguous()
        if self._counts is not None:
            tensors["counts"] = self._counts
        state = {
            "format": FORMAT,
            "shift": self._shift,
            "removed": self._removed,
            "seen_tokens": self.seen_tokens,
            "context": self._context,
            "layout": asdict(self.layout),
        }
        save_file(tensors, str(path), metadata={"kvpass": json.dumps(state)})

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> "CompressedCache":
        """Read what `save` wrote. Raises `CacheError` if the file is something else."""
        foreign = CacheError(f"{path} is not a cache written by CompressedCache.save (format {FORMAT})")
        try:
            opened = safe_open(str(path), framework="pt", device=str(device))
        except SafetensorError as error:
            raise foreign from error
        with opened as file:
            state = json.loads((file.metadata() or {}).get("kvpass", "{}"))
            if state.get("format") != FORMAT:
                raise foreign
            layout = CacheLayout(
                layers=tuple(LayerLayout(**layer) for layer in state["layout"]["layers"]),
                model_id=state["layout"]["model_id"],
                capacity=state["layout"]["capacity"],
            )
            cache = cls(layout, device)
            names = set(file.keys())
            stored = [(file.get_tensor(f"keys.{i}"), file.get_tensor(f"values.{i}")) for i in range(len(cache))]
            kept = [file.get_tensor(f"kept.{i}") if f"kept.{i}" in names else None for i in range(len(cache))]
            counts = file.get_tensor("counts") if "counts" in names else None
        cache.allocate(stored[0][0].shape[0], [keys.shape[2] for keys, _ in stored])
        for layer, (keys, values) in enumerate(stored):
            cache._keys[layer][:, :, : keys.shape[2]] = keys
            cache._values[layer][:, :, : values.shape[2]] = values
        cache.begin(state["seen_tokens"], kept, [keys.shape[2] for keys, _ in stored])
        cache._context = (state["context"][0], list(state["context"][1]))
        cache._shift, cache._removed, cache._counts = state["shift"], state["removed"], counts
        cache._sync_lengths()
        return cache
