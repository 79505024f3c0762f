"""The clock that all subjects are measured with: when the logits of each token are there."""

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from kvpass.bench.floor import synchronize
from kvpass.bench.memory import peak_memory
from kvpass.bench.subjects import Subject, cache_bytes


@dataclass(frozen=True)
class Sample:
    """One run: seconds, and bytes. `peak` is that of the process, or of CUDA's allocator."""

    prefill: float
    first_token: float
    step: float  # mean over the decode steps
    kept_bytes: int
    allocated_bytes: int
    peak: int | None
    tokens: tuple[int, ...] = field(repr=False)


class _Clock(LogitsProcessor):
    """Notes when `generate` has the logits of a token; on CUDA it waits for the first and the last alone."""

    def __init__(self, device: torch.device, total: int) -> None:
        self.times: list[float] = []
        self._device, self._total = device, total

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if len(self.times) in (0, self._total - 1):
            synchronize(self._device)
        self.times.append(time.perf_counter())
        return scores


class _FirstToken:
    """A streamer that notes when the first token arrives, behind the prompt."""

    def __init__(self) -> None:
        self.calls = 0
        self.time = 0.0

    def put(self, value: Tensor) -> None:
        self.calls += 1
        if self.calls == 2:
            value.tolist()
            self.time = time.perf_counter()

    def end(self) -> None:
        """Nothing is left to write."""


@torch.no_grad()
def run(subject: Subject, ids: Tensor, new_tokens: int) -> Sample:
    """Generate greedily behind `ids` i64[1, S]."""
    clock, first = _Clock(ids.device, new_tokens), _FirstToken()
    options: dict[str, Any] = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": new_tokens,
        "min_new_tokens": new_tokens,
        "do_sample": False,
        "return_dict_in_generate": True,
        "logits_processor": LogitsProcessorList([clock]),
        "streamer": first,
        "pad_token_id": 0,
    }
    with peak_memory(ids.device) as peak:
        synchronize(ids.device)
        start = time.perf_counter()
        result = subject.generate(ids, **options)
        synchronize(ids.device)
    kept, allocated = cache_bytes(result.past_key_values)
    return Sample(
        clock.times[0] - start,
        first.time - start,
        (clock.times[-1] - clock.times[0]) / (new_tokens - 1),
        kept,
        allocated,
        peak.bytes,
        tuple(result.sequences[0, ids.shape[1] :].tolist()),
    )
