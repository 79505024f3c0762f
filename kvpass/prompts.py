"""Which prefill graph is for prompts of which length."""

from dataclasses import dataclass

from kvpass.budget import Budget, Prompt
from kvpass.errors import PackageError
from kvpass.press import Press


@dataclass(frozen=True)
class Prompts:
    """The prompts that one prefill graph is for."""

    press: Press | None
    budget: Budget
    tokens: tuple[int, ...]  # ascending

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """First and last length of each run of lengths."""
        known = set(self.tokens)
        starts = [n for n in self.tokens if n - 1 not in known]
        return list(zip(starts, [n for n in self.tokens if n + 1 not in known], strict=True))

    def greatest(self, layers: int) -> tuple[tuple[str, int], ...]:
        """The greatest value of each size that the press counts, in any of so many layers, by its name."""
        found: dict[str, int] = {}
        if self.press is not None:
            for tokens in self.tokens:
                for layer in range(layers) if self.press.per_layer else (0,):
                    for name, size in self.press.sizes(Prompt(tokens, self.budget, layer, layers)).items():
                        found[name] = max(found.get(name, 0), size)
        return tuple(sorted(found.items()))


def prompts_of(press: Press | None, budget: Budget, layers: int, longest: int) -> list[Prompts]:
    """Which press compresses prompts of which length, up to `longest`; any others are kept whole by extend.

    Raises `PackageError` if the press asks for more than the token ids, or compresses none of them.
    """
    if press is None:
        return [Prompts(None, budget, tuple(range(2, longest + 1)))]
    if press.needs_question:
        raise PackageError(
            f"{press.name} must be told which tokens are the question, which no exported graph is; export with another "
            "press, or save() the model and let kvpass run it"
        )
    found: dict[Press, list[int]] = {}
    for tokens in range(2, longest + 1):
        prompt = Prompt(tokens, budget, 0, layers)
        if press.fits(prompt):
            found.setdefault(press.for_prompt(prompt), []).append(tokens)
    if not found:
        raise PackageError(f"{press.name} compresses no prompt of up to {longest} tokens; raise max_tokens")
    return [Prompts(chosen, budget, tuple(tokens)) for chosen, tokens in found.items()]
