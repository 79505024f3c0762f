"""The same questions and the same clock for the model as it is and for the compiled one."""

import copy
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from kvpass.demo.context import Context, encode
from kvpass.runtime.cache import CompressedCache
from kvpass.runtime.cache_name import CACHE
from kvpass.runtime.model import CompiledModel

ANSWER_TOKENS = 10

Model = PreTrainedModel | CompiledModel
Step = Callable[[str], AbstractContextManager[None]]


@dataclass(frozen=True)
class Measured:
    """What one model did. All numbers are of the second pass: the first one compiles and warms up."""

    answers: tuple[str, ...]
    continuation: str
    kept: tuple[int, ...]  # entries per KV head, by layer, after the prefill
    used_bytes: int  # of keys and values
    allocated_bytes: int
    prefill_seconds: float
    decode_tokens_per_second: float


@torch.no_grad()
def warm_up(model: Model, context: Context, tokenizer: PreTrainedTokenizerBase, step: Step) -> None:
    """Call every phase as `measure` does, which compiles it; `step` wraps each phase."""
    with step("prefill"):
        cache, logits = _read(model, context.ids)
    with step("extend"):
        _answer(model, cache, context, context.needles[0].question, tokenizer, new_tokens=1)
    with step("decode"):
        _continue(model, copy.deepcopy(cache), logits, new_tokens=3)


@torch.no_grad()
def measure(model: Model, context: Context, tokenizer: PreTrainedTokenizerBase, new_tokens: int) -> Measured:
    """Read the context once; continue it and answer every question from copies of the one cache."""
    start = time.perf_counter()
    cache, logits = _read(model, context.ids)
    prefill_seconds = time.perf_counter() - start
    kept = tuple(_entries(cache, layer) for layer in range(len(cache)))
    used, allocated = _sizes(cache)
    ids, seconds = _continue(model, copy.deepcopy(cache), logits, new_tokens)
    return Measured(
        tuple(_answer(model, cache, context, needle.question, tokenizer) for needle in context.needles),
        str(tokenizer.decode(ids[0], skip_special_tokens=True)),
        kept,
        used,
        allocated,
        prefill_seconds,
        (new_tokens - 1) / seconds,
    )


def _read(model: Model, ids: Tensor) -> tuple[Cache, Tensor]:
    """Prefill: the cache, and the logits [1, 1, V] of the last token. Only those: as generate() does it."""
    cache: Cache
    cache = model.new_cache() if isinstance(model, CompiledModel) else DynamicCache(config=model.config)
    result = model(input_ids=ids, logits_to_keep=1, **{CACHE: cache})
    return cache, result.logits


def _continue(model: Model, cache: Cache, logits: Tensor, new_tokens: int) -> tuple[Tensor, float]:
    """Greedy decoding: ids i64[1, new_tokens], and the seconds of all but the first, which `logits` give."""
    tokens = [logits[:, -1:].argmax(dim=-1)]
    start = time.perf_counter()
    while len(tokens) < new_tokens:
        logits = model(input_ids=tokens[-1], **{CACHE: cache}).logits
        tokens.append(logits[:, -1:].argmax(dim=-1))
    return torch.cat(tokens, dim=1), time.perf_counter() - start


def _answer(
    model: Model,
    cache: Cache,
    context: Context,
    question: str,
    tokenizer: PreTrainedTokenizerBase,
    new_tokens: int = ANSWER_TOKENS,
) -> str:
    """The first line of the greedy answer to one question; `cache` stays as it is, for the next one."""
    ids = torch.cat([context.ids, encode(tokenizer, question)], dim=1)
    generate: Any = model.generate
    output = generate(
        ids,
        attention_mask=torch.ones_like(ids),
        **{CACHE: copy.deepcopy(cache)},
        max_new_tokens=new_tokens,
        do_sample=False,
    )
    text = str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)).strip()
    return text.splitlines()[0] if text else ""


def _entries(cache: Cache, layer: int) -> int:
    return cache.kept(layer) if isinstance(cache, CompressedCache) else cache.get_seq_length(layer)


def _sizes(cache: Cache) -> tuple[int, int]:
    """Bytes of the entries, bytes of the storage that holds them."""
    if isinstance(cache, CompressedCache):
        return cache.used_bytes, cache.nbytes
    layers: list[Any] = cache.layers
    tensors = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
    return sum(t.nbytes for t in tensors), sum(t.untyped_storage().nbytes() for t in tensors)
