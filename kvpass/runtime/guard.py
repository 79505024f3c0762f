"""Which phase graph runs: a pure function of integers that the host knows, no device is ever asked."""

from dataclasses import dataclass

from kvpass.ir.form import Phase


@dataclass(frozen=True)
class Guard:
    """`min_tokens` is the shortest prompt that the press can compress."""

    min_tokens: int = 2

    def phase(self, new_tokens: int, seen_tokens: int) -> Phase:
        """The phase for `new_tokens` given at once after `seen_tokens`.

        One token is always DECODE, also on an empty cache: compilers treat a size of 1 apart. A prompt too short for
        the press is EXTEND on an empty cache, which keeps it whole.
        """
        if new_tokens == 1:
            return Phase.DECODE
        if seen_tokens == 0 and new_tokens >= self.min_tokens:
            return Phase.PREFILL
        return Phase.EXTEND
