"""The compressed cache: preallocated, written in place by the graphs, with the text position of every entry."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import Cache

from kvpass.backends.replay import Replay
from kvpass.errors import CacheError
from kvpass.ir.program import STORED, Port
from kvpass.runtime.layout import CacheLayout, Context, Extent

Stored = dict[int, tuple[Tensor, Tensor]]


class CompressedCache(Cache):
    """Keys and values of all layers, and where in the text each entry comes from.

    `get_seq_length()` counts the columns of the caller's text, `seen_tokens` the tokens of its longest row,
    `kept(layer)` the entries that are left of them. A slot is where an entry lies, a position which token it was.
    Rows may differ in all of these. Layers of windows or chunks keep a ring of what a token can reach.
    """

    is_compileable = False  # keeps transformers from compiling around it
    is_initialized = True

    def __init__(self, layout: CacheLayout, device: torch.device | str) -> None:
        super().__init__(layers=[])
        self.layout = layout
        self.device = torch.device(device)
        self._extent = Extent()
        self._context = Context()
        self._buffers: list[tuple[Tensor, ...]] = []
        self._kept: list[Tensor | None] = [None] * len(layout.layers)  # positions of what the prefill left
        self._room = 0  # tokens that can come before anything must be looked at again
        self._bound: tuple[Sequence[Port], list[Any]] | None = None  # what `storage` found last
        self.step: Replay | None = None  # the last decode step, which was recorded with this storage
        self._rings: Stored = {}  # those at the end of the context, kept from when new tokens overwrite them
        self.lengths = torch.empty(0)  # i64[L, B], entries in use; of rings, tokens seen
        self.next_of_rows = torch.empty(0)  # i64[B], the position of the next token

    # -- what the graphs read and write ------------------------------------------------------------------------

    def buffers(self, layer: int) -> tuple[Tensor, ...]:
        """The storage of a layer, free slots included: keys, values [B, Hkv, C, D], perhaps positions i64[B, Hkv, C]"""
        return self._buffers[self.layout.holder(layer)]

    def storage(self, ports: Sequence[Port], rows: slice | None = None) -> list[Any]:
        """For each of these inputs of a graph what is stored of some rows (None: all); None for inputs of other roles.

        Remembered while the storage stays where it is, since a graph asks at every token.
        """
        if rows is None and self._bound is not None and self._bound[0] is ports:
            return self._bound[1].copy()
        found: list[Any] = [None] * len(ports)
        for place, port in enumerate(ports):
            if port.role in STORED and port.layer is not None:
                buffer = self.buffers(port.layer)[STORED.index(port.role)]
                found[place] = buffer if rows is None else buffer[rows]
        if rows is None:
            self._bound = (ports, found.copy())
        return found

    def store(self, returned: Sequence[tuple[Port, Tensor]], rows: slice | None = None) -> None:
        """Keep what a graph returned of some rows (None: all) as the first slots of a layer, or as all of them."""
        for port, tensor in returned:
            assert port.layer is not None
            layer, which = self.layout.holder(port.layer), STORED.index(port.role)
            buffers = self._buffers[layer]
            if rows is None and tensor.shape == buffers[which].shape:
                self._buffers[layer] = (*buffers[:which], tensor, *buffers[which + 1 :])
                self._bound = self.step = None
            else:
                held = buffers[which] if rows is None else buffers[which][rows]
                held[:, :, : tensor.shape[2]] = tensor

    def allocate(self, batch: int, entries: Sequence[int]) -> None:
        """Room for a fresh prefill that leaves at most `entries[layer]` in each row of a layer."""
        with torch.inference_mode(False):
            self._buffers = [
                layer.buffers(batch, self.layout.slots(layer, need), self.device)
                for layer, need in zip(self.layout.layers, entries, strict=True)
            ]
            self._bound = self.step = None
            self._room = 0
            self.lengths = torch.zeros(len(entries), batch, dtype=torch.int64, device=self.device)
            self.next_of_rows = torch.zeros(batch, dtype=torch.int64, device=self.device)
        self._extent = Extent.empty(batch)
        self._context = Context.of_plain_text(self._extent, len(entries))

    def begin(
        self, context: Context, kept: Sequence[Tensor | None], counts: Mapping[int, Tensor] | None = None
    ) -> None:
        """Note what a prefill has written.

        kept[layer]: i64[B, Hkv, n], or None if all of it. counts[layer]: i64[B], how many of the slots are occupied
        in each row, where the press decided; asking for them is one synchronisation.
        """
        self._kept = list(kept)
        if counts:
            found = torch.stack(list(counts.values())).tolist()
            entries = list(context.entries)
            for layer, row in zip(counts, found, strict=True):
                entries[layer] = tuple(row)
            context = Context(context.extent, tuple(entries))
        self._context, self._extent = context, context.extent
        self._rings, self._room = {}, 0
        if counts:
            self._trim()
        self._sync_lengths()

    def _trim(self) -> None:
        """Give back the room of what was decided to be dropped, where it is worth a copy."""
        for index in self.layout.holders:
            layer = self.layout.layers[index]
            if self.layout.capacity is not None or layer.ring is not None:
                continue
            used, kept = self.kept(index), self._kept[index]
            capacity = self.layout.slots(layer, used)
            if kept is not None:
                self._kept[index] = kept[:, :, :used]
            if capacity < 0.75 * self._buffers[index][0].shape[2]:
                self._resize(index, capacity)

    def reserve(self, tokens: int) -> None:
        """Make sure that `tokens` more entries fit; grows in steps, so that growth is rare."""
        if tokens <= self._room:
            return
        self._room = 2**31
        for index in self.layout.holders:
            layer = self.layout.layers[index]
            need = max(self._entries(index)) + tokens
            slots = self._buffers[index][0].shape[2]
            if need > slots and slots != layer.ring:
                self._resize(index, self.layout.slots(layer, need))
            if layer.ring is None or need <= layer.ring:
                self._room = min(self._room, tokens + self._buffers[index][0].shape[2] - need)
            elif index not in self._rings:
                self._keep_ring(index, layer.ring)

    def _keep_ring(self, index: int, ring: int) -> None:
        """Keep what the context left in a ring before it is overwritten for the first time."""
        whole = max(self._entries(index)) <= ring or self._context.extent == self._extent
        if whole and self._extent.columns:
            keys, values = self._buffers[index]
            self._rings[index] = (keys.clone(), values.clone())

    def advance(
        self, columns: int, tokens: Sequence[int] | None = None, next_positions: Sequence[int] | None = None
    ) -> None:
        """Note that `tokens[row]` entries, by default as many as `columns`, were appended to every layer."""
        self._room = max(0, self._room - columns)
        counted = tuple(tokens) if tokens is not None else (columns,) * self.lengths.shape[1]
        first = self._extent.columns == 0
        self._extent = self._extent.grown(columns, counted, next_positions)
        if first:  # a prompt that was kept whole is the context, as after a prefill
            self._context = Context.of_plain_text(self._extent, len(self))
        more = columns if tokens is None else torch.tensor(counted, device=self.device)
        self.lengths += more
        if next_positions is None:
            self.next_of_rows += more
        else:
            self.next_of_rows.copy_(torch.tensor(next_positions))

    def _resize(self, index: int, capacity: int) -> None:
        used = min(self._buffers[index][0].shape[2], capacity)
        layer = self.layout.layers[index]
        with torch.inference_mode(False):
            new = layer.buffers(self.lengths.shape[1], capacity, self.device)
            for target, source in zip(new, self._buffers[index], strict=True):
                target[:, :, :used] = source[:, :, :used]
            self._buffers[index] = new
            self._bound = self.step = None  # which hold the memory that was left

    def _entries(self, layer: int) -> list[int]:
        """How many entries each row has in use; of a ring, how many it has seen."""
        context, layer = self._context, self.layout.holder(layer)
        rows = zip(context.entries[layer], self._extent.seen, context.extent.seen, strict=True)
        return [entries + seen - before for entries, seen, before in rows]

    def _sync_lengths(self) -> None:
        """Set the tensors that graphs read to what is in use now."""
        self.lengths.copy_(torch.tensor([self._entries(layer) for layer in range(len(self))], dtype=torch.int64))
        self.next_of_rows.copy_(torch.tensor(self.next_positions, dtype=torch.int64))

    # -- what people read --------------------------------------------------------------------------------------

    @property
    def seen_tokens(self) -> int:
        """Tokens that were read, padding not counted; of the longest row."""
        return self._extent.longest

    @property
    def seen_by_row(self) -> tuple[int, ...]:
        """Tokens that each row has read; none while the cache is empty."""
        return self._extent.seen

    @property
    def next_positions(self) -> tuple[int, ...]:
        """The position of the next token of each row."""
        return self._extent.next

    @property
    def next_position(self) -> int:
        """The position of the next token, of the row where it is greatest."""
        return max(self.next_positions, default=0)

    def keys(self, layer: int) -> Tensor:
        """The occupied entries, in position order. [B, Hkv, n, D]; n is that of the fullest row. A view but of rings"""
        return self._occupied(layer, 0)

    def values(self, layer: int) -> Tensor:
        """The occupied entries, in position order. [B, Hkv, n, D]; n is that of the fullest row. A view but of rings"""
        return self._occupied(layer, 1)

    def _occupied(self, layer: int, which: int) -> Tensor:
        layer = self.layout.holder(layer)
        ring, buffer = self.layout.layers[layer].ring, self._buffers[layer][which]
        if ring is None or self.seen_tokens <= ring:
            return buffer[:, :, : self.kept(layer)]
        slots = self.positions(layer).clamp(min=0) % ring
        return buffer.gather(2, slots[..., None].expand(-1, -1, -1, buffer.shape[3]))

    def positions(self, layer: int) -> Tensor:
        """Which token of the text each entry was; -1 behind the end of a row that holds fewer. i64[B, Hkv, n]"""
        layer = self.layout.holder(layer)
        batch, heads, n = (
            self.lengths.shape[1] if self._buffers else 0,
            self.layout.layers[layer].heads,
            self.kept(layer),
        )
        slot = torch.arange(n, device=self.device).expand(batch, heads, n)
        if not n:
            return slot
        seen = self._per_row(self._extent.seen)
        if self.layout.layers[layer].ring is not None:
            found = slot + (seen - n).clamp(min=0)
            return torch.where(found < seen, found, -1)
        count, context = self._per_row(self._context.entries[layer]), self._per_row(self._context.extent.seen)
        found = torch.where(slot < count, slot, slot - count + context)
        if (kept := self._kept[layer]) is not None:
            width = min(n, kept.shape[2])
            found[:, :, :width] = torch.where(slot[:, :, :width] < count, kept[:, :, :width], found[:, :, :width])
        return torch.where(slot < self._per_row(self._entries(layer)), found, -1)

    def _per_row(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, device=self.device)[:, None, None]

    def kept(self, layer: int) -> int:
        """How many entries each KV head of the layer holds, in the fullest row."""
        if not self._buffers:
            return 0
        ring, entries = self.layout.layers[layer].ring, max(self._entries(layer))
        return entries if ring is None else min(entries, ring)

    @property
    def batch_size(self) -> int | None:  # type: ignore[override]
        """Rows of the cache; None while it is empty."""
        return self._buffers[0][0].shape[0] if self._buffers else None

    @property
    def nbytes(self) -> int:
        """Bytes of storage of keys and values, free slots and what `rewind` needs of rings included."""
        return sum(t.nbytes for held in (*self._buffers, *self._rings.values()) for t in held)

    @property
    def used_bytes(self) -> int:
        """Bytes of the occupied entries alone."""
        return sum(t[:, :, : self.kept(layer)].nbytes for layer, held in enumerate(self._buffers) for t in held)

    def __len__(self) -> int:
        return len(self.layout.layers)

    def __repr__(self) -> str:
        kept = [self.kept(layer) for layer in range(len(self))]
        return f"CompressedCache(seen_tokens={self.seen_tokens}, kept={kept}, nbytes={self.nbytes})"

    # -- going back, copying -----------------------------------------------------------------------------------

    def rewind(self) -> Self:
        """Forget all that came after the context (the first prompt), so that another question can follow it."""
        self._extent, self._room = self._context.extent, 0
        for layer, held in self._rings.items():
            for buffer, tensor in zip(self._buffers[layer], held, strict=True):
                buffer[:, :, : tensor.shape[2]] = tensor
        self._rings = {}
        if self._buffers:
            self._sync_lengths()
        return self

    def crop(self, max_length: int) -> None:
        """Forget the last columns until `max_length` are left (zero or less: that many fewer than now).

        Raises `CacheError` for what lies inside a compressed context, and where a ring has overwritten what would be
        needed: what was dropped does not come back.
        """
        extent, context = self._extent, self._context.extent
        target = extent.columns + max_length if max_length <= 0 else min(max_length, extent.columns)
        removed = extent.columns - target
        if not removed:
            return
        if target < 0:
            raise CacheError(f"cannot crop {-max_length} tokens, the cache has seen {extent.columns}")
        if target == context.columns:
            self.rewind()
            return
        compressed = any(kept is not None for kept in self._kept)
        if compressed and target < context.columns:
            raise CacheError(
                f"cannot crop to {target} tokens: the context of {context.columns} tokens is compressed; "
                "prefill the shorter text instead"
            )
        rings = [layer.ring for layer in self.layout.layers if layer.ring is not None and layer.ring < extent.longest]
        if rings or target < extent.whole:
            why = f"a window of {min(rings)} tokens has moved on" if rings else "rows are padded or embedded there"
            raise CacheError(f"cannot crop to {target} tokens: {why}; rewind(), copy() beforehand, or prefill again")
        seen, following = (tuple(n - removed for n in numbers) for numbers in (extent.seen, extent.next))
        self._room = 0
        self._extent = Extent(target, min(extent.whole, target), seen, following)
        if target < context.columns:
            self._context = Context.of_plain_text(self._extent, len(self))
        self._sync_lengths()

    def reset(self) -> None:
        """Empty the cache."""
        self.__init__(self.layout, self.device)  # type: ignore[misc]

    def copy(self) -> "CompressedCache":
        """An independent cache with the same content."""
        return self._selected(None)

    def __deepcopy__(self, memo: dict[int, Any]) -> "CompressedCache":
        return self.copy()

    def _selected(self, rows: Tensor | None) -> "CompressedCache":
        """A cache of these rows (None: all), in new memory."""

        def chosen(tensor: Tensor) -> Tensor:
            return tensor.clone() if rows is None else tensor.index_select(0, rows.to(tensor.device))

        twin = CompressedCache(self.layout, self.device)
        twin._extent, twin._context = self._extent, self._context
        if rows is not None and self._buffers:
            order = rows.tolist()
            twin._extent, twin._context = self._extent.selected(order), self._context.selected(order)
        twin._buffers = [tuple(map(chosen, held)) for held in self._buffers]
        twin._kept = [None if t is None else chosen(t) for t in self._kept]
        twin._rings = {layer: (chosen(k), chosen(v)) for layer, (k, v) in self._rings.items()}
        if self._buffers:
            twin.lengths, twin.next_of_rows = chosen(self.lengths.T).T.contiguous(), chosen(self.next_of_rows)
        return twin

    # -- what transformers calls -------------------------------------------------------------------------------

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of the caller's text, not entries kept: positions go on counting the text."""
        return self._extent.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give row i the content of row `beam_idx[i]` (beam search)."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order."""
        self.__dict__.update(self._selected(indices).__dict__)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self.batch_select_indices(torch.arange(self.batch_size or 0).repeat_interleave(repeats))

    # -- files -------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the occupied entries to a safetensors file. Raises `CacheError` if the cache is empty."""
        from kvpass.runtime.cache_files import save_cache

        save_cache(self, path)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> "CompressedCache":
        """Read what `save` wrote. Raises `CacheError` if the file is something else."""
        from kvpass.runtime.cache_files import load_cache

        return load_cache(path, device)
