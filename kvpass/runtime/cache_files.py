"""A cache as a safetensors file."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvpass.errors import CacheError
from kvpass.runtime.cache import CompressedCache
from kvpass.runtime.layout import CacheLayout, Context, Extent, LayerLayout

FORMAT = "kvpass-cache-5"
NAMES = ("keys", "values", "positions")  # of a layer's buffers


def save_cache(cache: CompressedCache, path: str | Path) -> None:
    """Write the slots in use, as they lie. Raises `CacheError` if the cache is empty."""
    if cache.batch_size is None:
        raise CacheError("an empty cache cannot be saved; prefill it first")
    tensors: dict[str, Tensor] = {}
    for layer in cache.layout.holders:
        for name, buffer in zip(NAMES, cache.buffers(layer), strict=False):
            tensors[f"{name}.{layer}"] = buffer[:, :, : cache.kept(layer)].contiguous()
        kept = cache._kept[layer]
        if kept is not None:
            tensors[f"kept.{layer}"] = kept.contiguous()
    for layer, (keys, values) in cache._rings.items():
        tensors |= {f"ring_keys.{layer}": keys.contiguous(), f"ring_values.{layer}": values.contiguous()}
    state = {
        "format": FORMAT,
        "extent": asdict(cache._extent),
        "context": asdict(cache._context),
        "layout": asdict(cache.layout),
    }
    save_file(tensors, str(path), metadata={"kvpass": json.dumps(state)})


def load_cache(path: str | Path, device: torch.device | str) -> CompressedCache:
    """Read what `save_cache` wrote. Raises `CacheError` if the file is something else."""
    foreign = CacheError(f"{path} is not a cache written by CompressedCache.save (format {FORMAT})")
    try:
        opened = safe_open(str(path), framework="pt", device=str(device))
    except SafetensorError as error:
        raise foreign from error
    with opened as file:
        state = json.loads((file.metadata() or {}).get("kvpass", "{}"))
        if state.get("format") != FORMAT:
            raise foreign
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    layers = tuple(LayerLayout(**layer) for layer in state["layout"]["layers"])
    layout = CacheLayout(layers, state["layout"]["model_id"], state["layout"]["capacity"])
    cache = CompressedCache(layout, device)
    entries = [tensors[f"keys.{layout.holder(i)}"].shape[2] for i in range(len(cache))]
    cache.allocate(tensors["keys.0"].shape[0], entries)
    for layer in layout.holders:
        for name, buffer in zip(NAMES, cache.buffers(layer), strict=False):
            buffer[:, :, : entries[layer]] = tensors[f"{name}.{layer}"]
    cache.begin(_context(state["context"]), [tensors.get(f"kept.{i}") for i in range(len(cache))])
    cache._extent = _extent(state["extent"])
    rings = {int(name.partition(".")[2]) for name in tensors if name.startswith("ring_keys.")}
    cache._rings = {i: (tensors[f"ring_keys.{i}"], tensors[f"ring_values.{i}"]) for i in rings}
    cache._sync_lengths()
    return cache


def _extent(state: dict[str, Any]) -> Extent:
    return Extent(state["columns"], state["whole"], tuple(state["seen"]), tuple(state["next"]))


def _context(state: dict[str, Any]) -> Context:
    return Context(_extent(state["extent"]), tuple(map(tuple, state["entries"])))
