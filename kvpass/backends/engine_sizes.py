"""For which sizes an engine is built."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from kvpass.errors import InputError
from kvpass.ir.form import Phase
from kvpass.prompts import Prompts

Range = tuple[int, int, int]  # least, usual and greatest value of a size
Profile = Mapping[str, Range]  # of new tokens by phase ("prefill", "extend"), and of "slots" of a cache
NAMES = (Phase.PREFILL.value, Phase.EXTEND.value, "slots")


@dataclass(frozen=True)
class EngineSizes:
    """Where one phase graph serves: so many new tokens over caches of so many slots, those of rings always whole."""

    tokens: Range
    slots: Range
    rings: tuple[int | None, ...]  # slots of a layer of windows or chunks
    prompts: Prompts | None = None  # of a prefill


def sizes_of(
    phase: Phase, prompts: Prompts | None, max_tokens: int, rings: tuple[int | None, ...], profile: Profile
) -> EngineSizes:
    """What `profile` says, or all that can occur. Raises `InputError` if a prefill serves none of its prompts."""
    if phase is Phase.DECODE:
        low, high = 1, 1
    else:
        low, high = (prompts.tokens[0], prompts.tokens[-1]) if prompts else (2, max_tokens)
    given = profile.get(phase.value)
    tokens = token_range(phase.value, low, high, given)
    if given is not None:
        tokens = (max(tokens[0], low), max(tokens[1], low), min(tokens[2], high))
        if tokens[0] > tokens[2]:
            raise InputError(f"profile={{{phase.value!r}: {given}}}: this graph is for {low} to {high} tokens")
        tokens = (tokens[0], min(tokens[1], tokens[2]), tokens[2])
    if prompts is not None:
        prompts = replace(prompts, tokens=tuple(n for n in prompts.tokens if tokens[0] <= n <= tokens[2]))
    return EngineSizes(tokens, slot_range(low, tokens, max_tokens, profile.get("slots")), rings, prompts)


def token_range(phase: str, low: int, high: int, given: Range | None) -> Range:
    """New tokens at once: prompts are mostly of 1024 tokens, questions of 64."""
    return given or (low, max(low, min(1024 if phase == Phase.PREFILL.value else 64, high)), high)


def slot_range(low: int, tokens: Range, max_tokens: int, given: Range | None) -> Range:
    """Slots of a cache, mostly 2048; new tokens fit in."""
    held = given or (low, min(2048, max_tokens), max_tokens)
    least, usual, most = (max(pair) for pair in zip(held, tokens, strict=True))
    return least, usual, most


def checked_profile(profile: Any) -> Profile:
    """Raises `InputError` for anything but ascending numbers by known names."""
    for name, given in dict(profile or {}).items():
        if name not in NAMES:
            raise InputError(f"profile has {name!r}; it may say {', '.join(NAMES)}")
        numbers = tuple(given)
        if len(numbers) != 3 or not all(isinstance(n, int) for n in numbers) or not 0 < numbers[0] <= numbers[1]:
            raise InputError(f"profile[{name!r}] is {given}, expected the least, the usual and the greatest number")
        if numbers[1] > numbers[2]:
            raise InputError(f"profile[{name!r}] is {given}, which does not ascend")
    return {name: tuple(given) for name, given in dict(profile or {}).items()}
