"""Several methods, one after the other."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from kvpass.budget import Budget, Prompt
from kvpass.errors import NestingError, PressError
from kvpass.press import Compressed, ModelFacts, Press
from kvpass.press_inputs import PressInputs
from kvpass.presses.nesting import expect_press
from kvpass.registry import register_press
from kvpass.selection import gather


@register_press("composed")
@dataclass(frozen=True)
class Composed(Press):
    """Keeps what the last press keeps of what the one before it kept, and so on.

    `ratios` are the fractions that the parts remove of what they are given, None for a part that takes none; without
    them every part gets the ratio of compile. Keys and values are those that are left; queries and hidden states stay
    those of the whole prompt, and a pair is still told from its place in the text.
    """

    changes = "as its parts"

    presses: tuple[Press, ...] = ()
    ratios: tuple[float | None, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "presses", tuple(self.presses))
        if not self.presses:
            raise PressError("composed: no presses; give them in order, e.g. composed([snapkv, think])")
        for press in self.presses:
            expect_press(self.name, press)
        for i, press in enumerate(self.presses):
            dropped = any(before.drops for before in self.presses[:i])
            if dropped and press.needs_all_queries:
                raise NestingError(
                    f"composed: {press.name} pairs every key with its own query, which are gone after "
                    f"{self.presses[i - 1].name}; put it first"
                )
            if press.needs_question or (i and press.rerotates) or (i and press.per_layer):
                place = "alone" if press.needs_question else "first"
                raise NestingError(f"composed: {press.name} can only stand {place}")
            if not press.exact and i + 1 < len(self.presses):
                raise NestingError(f"composed: {press.name} leaves another number in each layer; put it last")
        if self.ratios is not None:
            object.__setattr__(self, "ratios", tuple(self.ratios))
            if len(self.ratios) != len(self.presses):
                raise PressError(f"composed: {len(self.ratios)} ratios for {len(self.presses)} presses")
            for press, ratio in zip(self.presses, self.ratios, strict=True):
                if press.needs_budget == (ratio is None):
                    raise PressError(f"composed: {press.name} {'needs' if ratio is None else 'takes no'} ratio")
                Budget(ratio)

    # What the parts have in common.

    @property
    def min_tokens(self) -> int:
        return max(press.min_tokens for press in self.presses)

    @property
    def needs_budget(self) -> bool:
        return self.ratios is None and any(press.needs_budget for press in self.presses)

    @property
    def drops(self) -> bool:
        return any(press.drops for press in self.presses)

    @property
    def exact(self) -> bool:
        return all(press.exact for press in self.presses)

    @property
    def per_layer(self) -> bool:
        return any(press.per_layer for press in self.presses)

    @property
    def rerotates(self) -> bool:
        return any(press.rerotates for press in self.presses)

    @property
    def changes_keys(self) -> bool:
        return any(press.changes_keys for press in self.presses)

    def next_position(self, prompt: Prompt) -> int:
        return self.presses[0].next_position(next(iter(self._prompts(prompt))))

    def assets(self, facts: ModelFacts) -> Mapping[str, Tensor]:
        return {
            f"part{i}_{name}": tensor
            for i, press in enumerate(self.presses)
            for name, tensor in press.assets(facts).items()
        }

    # Every part sees a shorter prompt.

    def _prompts(self, prompt: Prompt) -> Iterator[Prompt]:
        for i, press in enumerate(self.presses):
            if self.ratios is not None:
                prompt = replace(prompt, budget=Budget(self.ratios[i]))
            yield prompt
            prompt = replace(prompt, tokens=press.sizes(prompt).get("budget", prompt.tokens))

    def for_prompt(self, prompt: Prompt) -> Press:
        parts = tuple(p.for_prompt(part) for p, part in zip(self.presses, self._prompts(prompt), strict=True))
        same = all(new is old for new, old in zip(parts, self.presses, strict=True))
        return self if same else replace(self, presses=parts)

    def fits(self, prompt: Prompt) -> bool:
        return all(press.fits(part) for press, part in zip(self.presses, self._prompts(prompt), strict=True))

    def sizes(self, prompt: Prompt) -> dict[str, int]:
        sizes: dict[str, int] = {}
        left = prompt.tokens
        for i, (press, part) in enumerate(zip(self.presses, self._prompts(prompt), strict=True)):
            own = press.sizes(part)
            left = own.get("budget", left)
            sizes |= {f"part{i}_{name}": size for name, size in own.items()}
        return {**sizes, "budget": left} if self.drops else sizes

    def smallest(self) -> dict[str, int]:
        least: dict[str, int] = {}
        for i, press in enumerate(self.presses):
            least |= {f"part{i}_{name}": low for name, low in press.smallest().items()}
            if press.drops and i + 1 < len(self.presses):
                least[f"part{i}_budget"] = max(p.min_tokens for p in self.presses[i + 1 :])
        return least

    def scalars(self, prompt: Prompt) -> dict[str, float]:
        parts = zip(self.presses, self._prompts(prompt), strict=True)
        return {f"part{i}_{n}": v for i, (press, part) in enumerate(parts) for n, v in press.scalars(part).items()}

    def compress(self, x: PressInputs) -> Compressed:
        end, left = x.next_position, Compressed(x.keys, x.values)
        for i, press in enumerate(self.presses):
            part = x.part(f"part{i}_").replace({"keys": left.keys, "values": left.values}, next_position=end)
            if left.kept is not None:
                part = part.replace(positions=left.kept)
                if isinstance(pre := x.taps.get("keys_pre_rope"), Tensor):
                    part = part.replace({"keys_pre_rope": gather(pre, left.kept)})
            found = press.compress(part)
            left = replace(found, kept=_composed(left.kept, found.kept), scores=None)
        return left

    def accompany(self, x: PressInputs) -> Compressed | None:
        for i, press in enumerate(self.presses):
            if press.rerotates:
                return press.accompany(x.part(f"part{i}_"))
        return None


def _composed(before: Any, after: Any) -> Any:
    """Positions of positions."""
    if before is None or after is None:
        return after if before is None else before
    return before.gather(2, after)
