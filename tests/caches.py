"""What tests of caches have in common."""

from typing import Any

import torch
from torch import Tensor

import kvpass
from kvpass.presses import StreamingLLM

HALF: dict[str, Any] = {"press": StreamingLLM(), "ratio": 0.5}


def append(model: kvpass.CompiledModel, cache: kvpass.CompressedCache, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids, past_key_values=cache).logits
    return logits


def content(cache: kvpass.CompressedCache) -> list[Tensor]:
    """Everything that the occupied part of a cache holds."""
    read = (cache.keys, cache.values, cache.positions)
    return [of(layer).clone() for layer in range(len(cache)) for of in read]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
