"""What the hardware allows: bytes over the bandwidth, operations over the rate, both measured in the same run."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch

from kvpass.backends.huge_pages import gather_in_huge_pages

LINE = 2**28  # bytes that are read to measure the bandwidth, more than any cache holds
SIDES = (128, 512, 2048)  # of the matrices that are multiplied; larger ones come nearer to the greatest rate
LONG = 0.1  # seconds of one product, with which no larger matrices are tried


@dataclass(frozen=True)
class Hardware:
    """Rates of the machine, as measured: bytes and floating-point operations a second."""

    bandwidth: float
    matrix_rate: float


def measure_hardware(dtype: torch.dtype, device: torch.device, repeats: int = 7) -> Hardware:
    """Medians of reading memory (a sum) and of multiplying square matrices in `dtype`."""
    numbers = torch.ones(LINE // 4, dtype=torch.float32, device=device)
    gather_in_huge_pages([numbers])  # where weights are, too
    reading = median(_seconds(numbers.sum, device) for _ in range(repeats))
    for side in SIDES:  # a CPU without instructions for `dtype` would multiply the largest ones for minutes
        left = torch.randn(side, side, device=device).to(dtype)
        product = partial(torch.matmul, left, left)
        if _seconds(product, device) > LONG:
            break
    multiplying = median(_seconds(product, device) for _ in range(repeats))
    return Hardware(LINE / reading, 2 * side**3 / multiplying)


def middle(rates: Sequence[Hardware]) -> Hardware:
    """The median of each rate."""
    return Hardware(median(r.bandwidth for r in rates), median(r.matrix_rate for r in rates))


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    work()
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait for what was queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def decode_floor(model: Any, cache_bytes: int, hardware: Hardware) -> float:
    """Seconds of one decode step if it only read: every weight once, every kept pair once."""
    return (weight_bytes(model) + cache_bytes) / hardware.bandwidth


def weight_bytes(model: Any) -> int:
    """Bytes of weights that one token needs; of a table of embeddings that is not the output's, a row."""
    parts = {p.data_ptr(): p.nbytes for p in model.parameters()}
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    if head is None or head.weight.data_ptr() != embeddings.data_ptr():
        parts[embeddings.data_ptr()] = embeddings[:1].nbytes
    return sum(parts.values())


def prefill_floor(model: Any, tokens: int, hardware: Hardware) -> float:
    """Seconds of a prefill if it only multiplied: all weights but the head for every token, causal attention."""
    skipped = {p.data_ptr() for p in (model.get_input_embeddings().weight, model.get_output_embeddings().weight)}
    weights = sum(p.numel() for p in model.parameters() if p.dim() == 2 and p.data_ptr() not in skipped)
    config = model.config.get_text_config(decoder=True)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 2 * tokens**2 * config.num_attention_heads * size * config.num_hidden_layers  # half of QK and of PV
    return float(2 * weights * tokens + attention) / hardware.matrix_rate
