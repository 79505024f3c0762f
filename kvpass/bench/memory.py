"""The greatest memory that a stretch of work takes."""

import ctypes
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

RESET = Path("/proc/self/clear_refs")  # Linux: writing 5 there forgets the greatest resident size so far
STATUS = Path("/proc/self/status")


class Peak:
    """Bytes; None until the work is done, and where the system does not tell."""

    bytes: int | None = None


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """The peak of the allocator on CUDA, of the resident set of this process elsewhere."""
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated(device)
        return
    with suppress(OSError, AttributeError):  # not glibc: nothing is given back, the peak is an upper bound
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    told = False
    with suppress(OSError):  # not Linux, or not allowed
        RESET.write_text("5")
        told = True
    yield peak
    if told:
        found = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())
        peak.bytes = int(found.group(1)) * 1024 if found else None
