"""What a press is: plain tensor code that chooses among the key/value pairs of one layer.

Legend: B batch, H query heads, Hkv KV heads, S tokens of the prompt, D head size, N pairs to keep.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from torch import Tensor

from kvpass.budget import Prompt
from kvpass.errors import PressError
from kvpass.press_inputs import PressInputs
from kvpass.selection import best, compact, gather


@dataclass(frozen=True)
class ModelFacts:
    """What a press may need to know to load what was learned for a model."""

    name: str  # as the checkpoint is called; may be empty
    layers: int
    heads: int  # H
    kv_heads: int
    key_size: int  # D
    hidden_size: int | None  # D_model, None if the graph does not say


@dataclass(frozen=True)
class Compressed:
    """What a press leaves of one layer."""

    keys: Tensor  # [B, Hkv, N, D]
    values: Tensor  # [B, Hkv, N, D]
    kept: Tensor | None = None  # i64[B, Hkv, N], their positions, ascending; None: all are there
    count: Tensor | None = None  # i64[B], how many of the N are meant; None: all
    scores: Tensor | None = None  # [B, Hkv, S], what decided, for the eye


@dataclass(frozen=True)
class Press(ABC):
    """A compression method. Fields are its hyper-parameters, with the paper's defaults."""

    name: ClassVar[str]
    changes: ClassVar[str] = "drops pairs"  # what it does to the cache, for the tables
    needs_all_queries: ClassVar[bool] = False  # whether pair i must belong to query i

    @property
    def min_tokens(self) -> int:
        """The shortest prompt that the method can compress; shorter ones are kept whole. At least 2."""
        return 2

    @property
    def needs_budget(self) -> bool:
        """Whether it wants a ratio or a target size from `kvpass.compile`."""
        return True

    @property
    def needs_question(self) -> bool:
        """Whether it must know which tokens at the end of the prompt ask about the others."""
        return False

    @property
    def drops(self) -> bool:
        """Whether it ever leaves fewer pairs than tokens."""
        return True

    @property
    def exact(self) -> bool:
        """Whether all layers and rows keep just as many as counted; otherwise that many at most."""
        return True

    @property
    def per_layer(self) -> bool:
        """Whether `sizes` or `scalars` differ between layers."""
        return False

    @property
    def rerotates(self) -> bool:
        """Whether the kept keys move to positions 0..N-1, so that the text goes on at N."""
        return False

    @property
    def local(self) -> bool:
        """Whether the score of a token depends on nothing but this token."""
        return False

    @property
    def changes_keys(self) -> bool:
        """Whether kept keys differ from those of the model by more than a rotation."""
        return False

    def next_position(self, prompt: Prompt) -> int:
        """Where the text goes on behind the prompt."""
        return prompt.tokens

    def accompany(self, x: PressInputs) -> Compressed | None:
        """What a layer stores that is not pressed, if that is not what it has: a press may move all positions."""
        return None

    @property
    def example_tokens(self) -> int:
        """The length of the prompt that the graph is traced with; any that suits it would do."""
        return 2 * self.min_tokens + 61

    def for_prompt(self, prompt: Prompt) -> "Press":
        """The press that handles this prompt: itself, or another one whose graph fits such a length."""
        return self

    def fits(self, prompt: Prompt) -> bool:
        """Whether the prompt is long enough to be compressed."""
        return prompt.tokens >= self.min_tokens

    def sizes(self, prompt: Prompt) -> dict[str, int]:
        """Numbers that the graph needs, counted on the host: `x.size(name)`. "budget" is N, slots written per head."""
        return {"budget": prompt.kept}

    def smallest(self) -> dict[str, int]:
        """The least value of a size, where the tensor code relies on more than 2."""
        return {}

    def scalars(self, prompt: Prompt) -> dict[str, float]:
        """Fractions that the graph needs, computed on the host: `x.scalar(name)`."""
        return {}

    def assets(self, facts: ModelFacts) -> Mapping[str, Tensor]:
        """Learned tensors [L, ...], one part per layer: `x.asset(name)`. Loaded when the press is compiled."""
        return {}

    @abstractmethod
    def compress(self, x: PressInputs) -> Compressed:
        """What one layer stores."""


@dataclass(frozen=True)
class SelectingPress(Press):
    """A press that keeps some pairs as they are; the library compacts and gathers them in position order."""

    @abstractmethod
    def keep(self, x: PressInputs) -> Tensor:
        """Which pairs stay, at most N of each head, equally many in all heads of a row. bool[B, Hkv, S]"""

    def compress(self, x: PressInputs) -> Compressed:
        return self.compacted(x, self.keep(x))

    def compacted(self, x: PressInputs, keep: Tensor, scores: Tensor | None = None) -> Compressed:
        """The marked pairs; `keep` may be bool[B, 1, S]."""
        kept = compact(keep.expand(x.keys.shape[:3]), x.budget)
        count = None if self.exact else keep[:, 0].sum(dim=-1)
        return Compressed(gather(x.keys, kept), gather(x.values, kept), kept, count, scores)


@dataclass(frozen=True)
class ScorerPress(SelectingPress):
    """A press that is nothing but a score: the library keeps the N best pairs of every KV head."""

    @abstractmethod
    def score(self, x: PressInputs) -> Tensor:
        """How much each pair is worth, higher is better. [B, Hkv, S]"""

    def keep(self, x: PressInputs) -> Tensor:
        return best(self.score(x), x.budget)

    def compress(self, x: PressInputs) -> Compressed:
        scores = self.score(x)
        if scores.dim() != 3 or any(a != b for a, b in zip(scores.shape, x.keys.shape, strict=False)):
            raise PressError(
                f"{self.name}: layer {x.layer}: score() returned {tuple(scores.shape)}, expected [B, Hkv, S] = "
                f"{tuple(x.keys.shape[:3])}"
            )
        return self.compacted(x, best(scores, x.budget), scores)


@dataclass(frozen=True)
class Wrapper(Press):
    """A press around another one; what it does not say itself, the inner press says."""

    press: Press

    @property
    def inner(self) -> Press:
        return self.press

    @property
    def min_tokens(self) -> int:
        return self.press.min_tokens

    @property
    def needs_budget(self) -> bool:
        return self.press.needs_budget

    @property
    def needs_question(self) -> bool:
        return self.press.needs_question

    @property
    def drops(self) -> bool:
        return self.press.drops

    @property
    def exact(self) -> bool:
        return self.press.exact

    @property
    def per_layer(self) -> bool:
        return self.press.per_layer

    @property
    def rerotates(self) -> bool:
        return self.press.rerotates

    @property
    def changes_keys(self) -> bool:
        return self.press.changes_keys

    def next_position(self, prompt: Prompt) -> int:
        return self.press.next_position(prompt)

    def accompany(self, x: PressInputs) -> Compressed | None:
        return self.press.accompany(x)

    @property
    def example_tokens(self) -> int:
        return max(self.press.example_tokens, 2 * self.min_tokens + 61)

    def for_prompt(self, prompt: Prompt) -> Press:
        inner = self.press.for_prompt(prompt)
        return self if inner is self.press else self.around(inner)

    def around(self, inner: Press) -> Self:
        """The same wrapper around another press."""
        return replace(self, press=inner)

    def fits(self, prompt: Prompt) -> bool:
        return prompt.tokens >= self.min_tokens and self.press.fits(prompt)

    def sizes(self, prompt: Prompt) -> dict[str, int]:
        return self.press.sizes(prompt)

    def smallest(self) -> dict[str, int]:
        return self.press.smallest()

    def scalars(self, prompt: Prompt) -> dict[str, float]:
        return self.press.scalars(prompt)

    def assets(self, facts: ModelFacts) -> Mapping[str, Tensor]:
        return self.press.assets(facts)
