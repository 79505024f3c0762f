"""Every press of the registry, as the tests build it: small windows, seeded stand-ins for what is learned."""

import functools
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from kvpass import presses
from kvpass.press import Press

# Tiny models have 4 query heads, 2 KV heads of size 16, hidden size 64; learned tensors come for 2, 3 or 4 layers.
HEADS, KV_HEADS, WIDTH, HIDDEN = 4, 2, 16, 64


@functools.cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="kvpass-test-assets-"))


@functools.cache
def asset(method: str, layers: int) -> str:
    """A file with random learned tensors for a tiny model."""
    generator = torch.Generator().manual_seed(layers)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    if method == "qfilter":
        tensors = {"q_filters": draw(layers, KV_HEADS, WIDTH)}
    elif method == "expected_attention_stats":
        half = draw(layers, HEADS, WIDTH, WIDTH) / 4
        tensors = {"query_mean": draw(layers, HEADS, WIDTH), "query_cov": half @ half.mT}
    else:
        tensors = {}
        for layer in range(layers):
            tensors[f"layers.{layer}.0.weight"], tensors[f"layers.{layer}.0.bias"] = draw(8, HIDDEN), draw(8)
            tensors[f"layers.{layer}.2.weight"], tensors[f"layers.{layer}.2.bias"] = draw(KV_HEADS, 8), draw(KV_HEADS)
    path = _folder() / f"{method}-{layers}.safetensors"
    save_file(tensors, path)
    return str(path)


def press_by_name(name: str, layers: int) -> Press:
    """One press of that name, with options that suit prompts of some dozen tokens."""
    small = {
        "block": lambda: presses.Block(presses.KeyDiff(), block_size=16),
        "cap": lambda: presses.Cap(n_future_positions=16),
        "chunk": lambda: presses.Chunk(presses.SnapKV(window_size=4), chunk_length=24),
        "chunkkv": lambda: presses.ChunkKV(presses.SnapKV(window_size=4), chunk_length=7),
        "compactor": lambda: presses.Compactor(chunk_size=16, sketch_dimension=8),
        "composed": lambda: presses.Composed((presses.SnapKV(window_size=4), presses.ThinK(window_size=4))),
        "criticalkv": lambda: presses.CriticalKV(presses.SnapKV(window_size=4)),
        "entropy_gated_chunkkv": lambda: presses.EntropyGatedChunkKV(presses.Knorm()),
        "expected_attention": lambda: presses.ExpectedAttention(n_future_positions=16),
        "expected_attention_stats": lambda: presses.ExpectedAttentionStats(
            n_future_positions=16, stats_folder=asset("expected_attention_stats", layers)
        ),
        "key_rerotation": lambda: presses.KeyRerotation(presses.StreamingLLM()),
        "kvzap": lambda: presses.KVzap(surrogate=asset("kvzap", layers)),
        "lagkv": lambda: presses.LagKV(lag_size=8),
        "leverage": lambda: presses.Leverage(sketch_dimension=8),
        "merging": lambda: presses.Merging(presses.Knorm(), similarity_threshold=0.1, merge_fraction=0.5),
        "non_causal_attention": lambda: presses.NonCausalAttention(chunk_size=16),
        "observed_attention": lambda: presses.ObservedAttention(block=16),
        "per_layer": lambda: presses.PerLayer(presses.Knorm(), tuple(0.25 + 0.5 * (i % 2) for i in range(layers))),
        "pyramidkv": lambda: presses.PyramidKV(window_size=4),
        "qfilter": lambda: presses.QFilter(filters=asset("qfilter", layers)),
        "simlayerkv": lambda: presses.SimLayerKV(n_recent=12, lazy_threshold=0.5),
        "snapkv": lambda: presses.SnapKV(window_size=4),
        "think": lambda: presses.ThinK(window_size=4),
    }
    from kvpass.registry import press_class

    return small[name]() if name in small else press_class(name)()
