"""What the host counts for a press, as arithmetic that a graph does itself."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvpass.ir.symbols import Size

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Line:
    """(factor * S + offset) // divisor, at least `low` and at most `high`."""

    factor: int
    divisor: int = 1
    offset: int = 0
    low: int | None = None
    high: int | None = None

    def of(self, tokens: Counts) -> Counts:
        """The counts of many lengths."""
        counts = (self.factor * tokens + self.offset) // self.divisor
        if self.low is not None or self.high is not None:
            counts = np.clip(counts, self.low, self.high)
        return counts

    def __call__(self, tokens: Size) -> Size:
        """The count of one length, symbolic if that is."""
        if self.factor == 0:
            return self.offset
        count: Any = tokens if self.factor == 1 else self.factor * tokens
        count = count + self.offset if self.offset else count
        count = count // self.divisor if self.divisor > 1 else count
        count = count if self.low is None else torch.sym_max(count, self.low)
        count = count if self.high is None else torch.sym_min(count, self.high)
        return cast(Size, count)


@dataclass(frozen=True)
class Table:
    """A count for each length: where no `Line` gives them."""

    counts: Tensor  # i64[longest + 1]

    def __call__(self, tokens: Size, counts: Tensor) -> Size:
        """The count of one length, which only the graph's copy of the table knows."""
        here = torch.full((1,), cast(int, tokens), dtype=torch.int64, device=counts.device)
        count: Any = torch.ops.aten._local_scalar_dense.default(counts.index_select(0, here))
        torch._check(count >= 1)
        torch._check(count <= tokens)
        return cast(Size, count)


def rule(tokens: Sequence[int], counts: Sequence[int]) -> Line | Table:
    """What gives exactly these counts for these lengths: every one of them is tried."""
    x, y = np.asarray(tokens, np.int64), np.asarray(counts, np.int64)
    for line in _candidates(x, y):
        if np.array_equal(line.of(x), y):
            return line
    table = torch.zeros(int(x.max()) + 1, dtype=torch.int64)
    table[torch.from_numpy(x)] = torch.from_numpy(y)
    return Table(table)


def _candidates(x: Counts, y: Counts) -> Iterator[Line]:
    low, high = int(y.min()), int(y.max())
    if low == high:
        yield Line(0, offset=low)
    yield Line(1, offset=int(y[-1] - x[-1]))
    yield Line(1, offset=int(y[0] - x[0]), high=high)
    for denominator in (10, 100, 1000, 10000):  # the simplest ratio first
        slope = Fraction(float(y[-1]) / float(x[-1])).limit_denominator(denominator)
        for offset in (0, -1):  # a double lies at its fraction or a hair below
            for least in (None, 1):
                yield Line(slope.numerator, slope.denominator, offset, least)
