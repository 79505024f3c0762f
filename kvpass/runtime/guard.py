"""Which phase graph runs: a pure function of integers that the host knows, no device is ever asked."""

from kvpass.ir.form import Phase


def choose_phase(new_tokens: int, seen_tokens: int, *, fits: bool = True) -> Phase:
    """The phase for `new_tokens` given at once after `seen_tokens`; `fits`: long enough for the press.

    One token is always DECODE, also on an empty cache: compilers treat a size of 1 apart. A prompt too short for
    the press is EXTEND on an empty cache, which keeps it whole.
    """
    if new_tokens == 1:
        return Phase.DECODE
    return Phase.PREFILL if seen_tokens == 0 and fits else Phase.EXTEND
