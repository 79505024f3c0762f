"""What a press is, needs and changes: found by running it on random tensors, for the command line and the README."""

import dataclasses
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvpass.budget import Budget, Prompt
from kvpass.errors import MissingTapError, PressError
from kvpass.press import Press, ScorerPress
from kvpass.press_inputs import PressInputs
from kvpass.testing.presses import FACTS, random_inputs

RATIO = 0.5
# The shapes of one layer's part of what presses learn, for random stand-ins: nothing is loaded.
ASSETS: Mapping[str, tuple[int, ...]] = {
    "q_filters": (2, 16),
    "query_mean": (4, 16),
    "query_cov": (4, 16, 16),
    "in_weight": (64, 64),  # as wide as the hidden states, so that "out_weight" suits with it and without it
    "in_bias": (64,),
    "out_weight": (2, 64),
    "out_bias": (2,),
}
ORDER = ("keys", "values", "queries", "queries_pre_rope", "keys_pre_rope", "hidden_states", "output_weight", "rope")


@dataclass(frozen=True)
class PressFacts:
    """The facts of one press."""

    name: str
    sentence: str  # the first one of its docstring
    papers: tuple[str, ...]  # addresses
    needs: tuple[str, ...] | None  # what it reads of a layer; None: that depends on options that have no default
    of_inner: bool  # whether it also needs what the presses inside it need
    changes: str
    phase: str = "prefill"  # where it acts: no press here acts while decoding

    @property
    def needs_text(self) -> str:
        """The needs in words."""
        if self.needs is None:
            return "depends on its options"
        own = ", ".join(self.needs)
        if not self.of_inner:
            return own
        return f"those of the inner press, {own}" if own else "those of the inner press"


def facts_of(press: Press | type[Press]) -> PressFacts:
    """The facts of a press; of a class with its default options, and a wrapper class by what it adds itself."""
    cls = press if isinstance(press, type) else type(press)
    return PressFacts(
        name=cls.name,
        sentence=re.split(r"(?<=\.)\s", " ".join(docstring(cls).split()), maxsplit=1)[0],
        papers=_papers(cls),
        needs=_needs(press),
        of_inner=isinstance(press, type) and is_wrapper(cls),
        changes=press.changes,
    )


def is_wrapper(cls: type[Press]) -> bool:
    """Whether it has presses inside."""
    return bool({"press", "presses"} & set(cls.__dataclass_fields__))


def docstring(cls: type[Press]) -> str:
    """What the author wrote about the class; "" if nothing."""
    # A dataclass without a docstring is given its signature as one.
    text = cls.__doc__ or ""
    return "" if text.startswith(f"{cls.__name__}(") else inspect.cleandoc(text)


def fields_of(press: Press | type[Press]) -> list[tuple[str, str, str]]:
    """Name, type and default of every option; of an object its value, marked if it is not the default."""
    rows = []
    for field in dataclasses.fields(press):
        kind = field.type.__name__ if isinstance(field.type, type) else str(field.type)
        # Annotations are evaluated: unions and generics carry the modules of their parts.
        kind = re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", kind)
        value = _default(field)
        if not isinstance(press, type):
            given = repr(getattr(press, field.name))
            value = given if given == value else f"{given} (default: {value})" if value != "required" else given
        rows.append((field.name, kind, value))
    return rows


def _default(field: "dataclasses.Field[Any]") -> str:
    if field.default is not dataclasses.MISSING:
        return repr(field.default)
    return "required" if field.default_factory is dataclasses.MISSING else repr(field.default_factory())


def _papers(cls: type[Press]) -> tuple[str, ...]:
    module = inspect.getmodule(cls)
    return tuple(found.rstrip(".,;") for found in re.findall(r"https?://[^\s>)]+", (module and module.__doc__) or ""))


@dataclass(frozen=True)
class _Inner(ScorerPress):
    """Stands in a wrapper and reads nothing but what every press that drops pairs reads, keys and values."""

    name: ClassVar[str] = "inner"

    def score(self, x: PressInputs) -> Tensor:
        return x.keys[..., 0]


def _needs(press: Press | type[Press]) -> tuple[str, ...] | None:
    if not isinstance(press, type):
        try:
            return _named(_reads(press))
        except PressError:  # options that suit another number of layers
            press = type(press)
    # Fields without a usable default, as wrappers have them.
    given: dict[str, Any] = {
        "press": _Inner(),
        "presses": (_Inner(),),
        "compression_ratios": (RATIO,) * FACTS.layers,
    }
    chosen = {name: value for name, value in given.items() if name in press.__dataclass_fields__}
    try:
        made: Press = press(**chosen)
    except (TypeError, PressError):
        return None
    return _named(_reads(made) - (_reads(_Inner()) if is_wrapper(press) else frozenset()))


def _reads(press: Press) -> frozenset[str]:
    """What `press.compress` reads of random tensors. An asset that is unknown here ends it."""
    tokens = press.example_tokens
    prompt = Prompt(tokens, Budget(RATIO), 0, FACTS.layers, question=min(8, tokens - 1))
    press = press.for_prompt(prompt)
    generator = torch.Generator().manual_seed(0)
    x = random_inputs(tokens, Budget(RATIO), batch=1).replace(
        {f"asset.{name}": torch.randn(shape, generator=generator) for name, shape in ASSETS.items()},
        sizes=press.sizes(prompt),
        scalars={name: torch.tensor(value) for name, value in press.scalars(prompt).items()},
    )
    try:
        press.compress(x)
    except MissingTapError:
        if all(name in x.taps or not name.startswith("asset.") for name in x.reads):
            raise
    return x.reads


def _named(reads: frozenset[str]) -> tuple[str, ...]:
    """In a fixed order, without the index of the layer, which is no tensor."""
    ordered = sorted(reads - {"layer"}, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))
    return tuple(name.replace("asset.", "asset ") for name in ordered)
