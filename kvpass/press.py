"""What a press is: plain tensor code that scores the key/value pairs of one layer.

Legend: B batch, H query heads, Hkv KV heads, G = H / Hkv, S tokens of the prompt, D head size, N pairs to keep.
"""

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from kvpass.errors import MissingTapError, PressError

Frequencies = tuple[Tensor, ...]


class Rope(Protocol):
    """The model's own rotary embedding, at any position."""

    def frequencies(self, positions: Tensor) -> Frequencies:
        """The tensors that the model rotates with (cos and sin, say) at positions i64[B or 1, P]."""

    def average(self, frequencies: Frequencies) -> Frequencies:
        """Their mean over the P positions, in their own dtype."""

    def rotate(self, states: Tensor, frequencies: Frequencies) -> Tensor:
        """Rotate states [B, heads, P or any, D]; linear in both arguments."""


class PressInputs:
    """What a press may read of one layer. Reading a field is what makes it a tap of the graph.

    Runs on real tensors too: `PressInputs({"keys": k, "values": v}, budget=torch.empty(50))`.
    Every field raises `MissingTapError` if the layer does not have it.
    """

    def __init__(
        self,
        taps: Mapping[str, Tensor | MissingTapError],
        *,
        rope: Rope | MissingTapError | None = None,
        budget: Tensor | None = None,
        scale: float | None = None,
        layer: int = 0,
        layers: int = 1,
    ) -> None:
        self._taps = taps
        self._rope = rope
        self._budget = budget
        self._scale = scale
        self._layer = layer
        self.layers = layers
        self.layer_was_read = False

    def _tap(self, name: str) -> Tensor:
        found = self._taps.get(name)
        if found is None:
            raise MissingTapError(f"layer {self._layer}: the press reads {name!r}, given are {sorted(self._taps)}")
        if isinstance(found, MissingTapError):
            raise found
        return found

    @property
    def layer(self) -> int:
        """The index of this layer among all `layers`."""
        self.layer_was_read = True
        return self._layer

    @property
    def keys(self) -> Tensor:
        """Keys as cached, after RoPE. [B, Hkv, S, D]"""
        return self._tap("keys")

    @property
    def values(self) -> Tensor:
        """Values as cached. [B, Hkv, S, D]"""
        return self._tap("values")

    @property
    def queries(self) -> Tensor:
        """Queries as attention reads them, after RoPE. [B, H, S, D]"""
        return self._tap("queries")

    @property
    def queries_pre_rope(self) -> Tensor:
        """Queries before RoPE, behind their norm if the model has one. [B, H, S, D]"""
        return self._tap("queries_pre_rope")

    @property
    def keys_pre_rope(self) -> Tensor:
        """Keys before RoPE, behind their norm if the model has one. [B, Hkv, S, D]"""
        return self._tap("keys_pre_rope")

    @property
    def hidden_states(self) -> Tensor:
        """What the query projection reads: the layer's normed input. [B, S, D_model]"""
        return self._tap("hidden_states")

    @property
    def rope(self) -> Rope:
        """The rotation between `queries_pre_rope` and `queries`; the identity in layers without RoPE."""
        if self._rope is None:
            raise MissingTapError(f"layer {self._layer}: the press reads 'rope', none is given")
        if isinstance(self._rope, MissingTapError):
            raise self._rope
        return self._rope

    @property
    def scale(self) -> float:
        """What attention multiplies the logits with."""
        return self._scale if self._scale is not None else float(self.keys.shape[-1]) ** -0.5

    @property
    def budget(self) -> int:
        """N, how many pairs each KV head will keep; symbolic while tracing."""
        if self._budget is None:
            raise MissingTapError(f"layer {self._layer}: the press reads 'budget', none is given")
        return self._budget.shape[0]

    def per_kv_head(self, per_query_head: Tensor) -> Tensor:
        """[B, H, ...] as [B, Hkv, G, ...]: consecutive query heads share a KV head."""
        heads = self.keys.shape[1]
        grouped: Tensor = per_query_head.unflatten(1, (heads, per_query_head.shape[1] // heads))
        return grouped


@dataclass(frozen=True)
class Press(ABC):
    """A compression method. Fields are its hyper-parameters, with the paper's defaults."""

    name: ClassVar[str]

    @property
    def min_tokens(self) -> int:
        """The shortest prompt that the method can compress; shorter ones are kept whole. At least 2."""
        return 2

    @abstractmethod
    def score(self, x: PressInputs) -> Tensor:
        """How much each pair is worth, higher is better. [B, Hkv, S]"""


@dataclass(frozen=True)
class ScorerPress(Press):
    """A press that is nothing but a score: the library keeps the N best pairs of every KV head."""


P = TypeVar("P", bound=type[Press])
_REGISTRY: dict[str, type[Press]] = {}


def register_press(name: str) -> Callable[[P], P]:
    """Class decorator: make a press known by name. Raises `PressError` if the name is taken by another class."""

    def register(cls: P) -> P:
        known = _REGISTRY.get(name)
        if known is not None and known.__qualname__ != cls.__qualname__:
            raise PressError(f"the press name {name!r} is taken by {known.__module__}.{known.__qualname__}")
        cls.name = name
        _REGISTRY[name] = cls
        return cls

    return register


def registered_presses() -> Mapping[str, type[Press]]:
    """All presses by name: the library's own, and those of installed packages (entry points `kvpass.presses`)."""
    import kvpass.presses  # registers the library's own  # noqa: F401

    for entry in entry_points(group="kvpass.presses"):
        if entry.name not in _REGISTRY:
            register_press(entry.name)(entry.load())
    return dict(sorted(_REGISTRY.items()))


def resolve_press(press: str | Press | None) -> Press | None:
    """A press by its name, or as it is. Raises `PressError` with the nearest names if there is none of that name."""
    if press is None or isinstance(press, Press):
        return press
    if isinstance(press, type) and issubclass(press, Press):
        raise PressError(f"press={press.__name__} is a class; give an object: {press.__name__}()")
    if not isinstance(press, str):
        raise PressError(f"press is a {type(press).__name__}, expected a name, a kvpass press or None")
    known = registered_presses()
    if press not in known:
        near = difflib.get_close_matches(press, known, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known are {', '.join(known)}"
        raise PressError(f"there is no press {press!r}; {hint}")
    return known[press]()


def protect(scores: Tensor, *, before: int = 0, after: int = 0) -> Tensor:
    """Add positions that are kept before all others: they get the greatest score of all, plus one.

    scores [B, Hkv, S - before - after] -> [B, Hkv, S]
    """
    best = (scores.amax() + 1).expand(scores.shape[:-1])[..., None]
    ends = [best.expand(-1, -1, count) for count in (before, after)]
    return torch.cat([end for end in (ends[0], scores, ends[1]) if end.shape[-1] != 0], dim=-1)
