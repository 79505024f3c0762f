"""How many pairs a KV head keeps: one rule, used everywhere."""

from dataclasses import dataclass

from kvpass.errors import PressError


def kept_count(tokens: int, ratio: float) -> int:
    """Pairs that stay of `tokens` when the fraction `ratio` is removed; at least 1.

    Double precision in this very order, then truncation, as in the reference: kept_count(100, 0.9) is 9.
    """
    return max(1, int(tokens * (1 - ratio)))


@dataclass(frozen=True)
class Budget:
    """Either the fraction to remove, or the number of pairs to keep."""

    ratio: float | None = None
    target_size: int | None = None

    def __post_init__(self) -> None:
        if self.ratio is not None and self.target_size is not None:
            raise PressError(f"ratio={self.ratio} and target_size={self.target_size}: give one of them")
        if self.ratio is not None and not (isinstance(self.ratio, int | float) and 0 <= self.ratio < 1):
            raise PressError(
                f"ratio is {self.ratio!r}, expected 0 <= ratio < 1: it is the fraction removed, 0.5 keeps half"
            )
        if self.target_size is not None and not (isinstance(self.target_size, int) and self.target_size >= 1):
            raise PressError(f"target_size is {self.target_size!r}, expected at least 1 pair, a whole number")

    @property
    def keeps_all(self) -> bool:
        """Whether no prompt ever loses anything."""
        return self.target_size is None and not self.ratio

    def count(self, tokens: int) -> int:
        """Pairs per KV head that stay of a prompt of `tokens`."""
        if self.target_size is not None:
            return min(tokens, self.target_size)
        return kept_count(tokens, self.ratio) if self.ratio else tokens

    def __str__(self) -> str:
        return f"target_size={self.target_size}" if self.target_size is not None else f"ratio={self.ratio or 0.0}"


@dataclass(frozen=True)
class Prompt:
    """What the host knows of one prompt when it counts what a layer keeps of it."""

    tokens: int  # S
    budget: Budget
    layer: int = 0
    layers: int = 1
    question: int | None = None  # how many of the last tokens ask about the others, if that was said

    @property
    def kept(self) -> int:
        """Pairs per KV head that stay."""
        return self.budget.count(self.tokens)

    @property
    def ratio(self) -> float:
        """The fraction removed."""
        return self.budget.ratio if self.budget.ratio is not None else 1 - self.kept / self.tokens
