"""The fixtures as the tests see them, the models that they were made of, and how far kvpass may be from them."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import tiny_model

import kvpass

FIXTURES = sorted((Path(__file__).resolve().parent / "fixtures").glob("*.safetensors"))
FILES = [path for path in FIXTURES if "-more" not in path.stem]
MORE_FILES = [path for path in FIXTURES if "-more" in path.stem]


def marks(path: Path) -> list[pytest.MarkDecorator]:
    """Without --exhaustive Llama, Qwen3 and Gemma 3 stand for the others, and Llama alone in bfloat16."""
    arch, dtype, *_ = path.stem.split("-")
    usual = arch in {"float32": ("llama", "qwen3", "gemma3_text"), "bfloat16": ("llama",)}[dtype]
    return [] if usual else [pytest.mark.exhaustive]


@dataclass(frozen=True)
class Tolerance:
    """How far kvpass may be from the reference in one dtype.

    ties
        Distance of a reference score from the selection threshold, relative to the threshold,
        below which the reference's choice counts as rounding.
    ties_after_rounding
        The same for a layer whose keys already differ from the reference's by rounding, because
        another attention kernel computed the layer below.
    strays
        Share of the entries of a row that may differ at all, ties or not, besides one.
    entries
        Absolute difference of keys and values.
    logits
        Absolute difference of logits; their standard deviation is about 1.6.
    """

    ties: float
    ties_after_rounding: float
    strays: float
    entries: float
    logits: float


TOLERANCES = {
    "float32": Tolerance(ties=1e-5, ties_after_rounding=1e-5, strays=1.0, entries=1e-5, logits=1e-4),
    # bfloat16 has 8 significant bits. kvpress forms attention logits in it: between 4 and 8 they
    # are 2^-5 apart, and one step in a logit moves its probability by as much (measured, for other
    # orders of operations and for scores in float32: 1.7 %). Once keys differ, every logit does,
    # and up to 16 their steps are 2^-4; two of those are 2^-3 (measured, with eager attention:
    # 8 %). That alone might let a wrong method pass; strays does not (measured: one of nine
    # entries). Keys and values up to 6 then differ by 0.16, logits by 0.12.
    "bfloat16": Tolerance(ties=2**-5, ties_after_rounding=2**-3, strays=0.1, entries=0.25, logits=0.25),
}


@dataclass(frozen=True)
class Reference:
    """One fixture file."""

    metadata: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    @property
    def tolerance(self) -> Tolerance:
        """The bounds that the file's dtype allows."""
        return TOLERANCES[self.metadata["dtype"]]

    @property
    def model_key(self) -> tuple[str, str, int]:
        """Architecture, dtype and seed: what makes the model."""
        return self.metadata["arch"], self.metadata["dtype"], self.metadata["seed"]

    def cases(self, label: str) -> list[dict[str, Any]]:
        """Return the cases of one press and parameter set, one for each ratio."""
        return [case for case in self.metadata["cases"] if case["label"] == label]

    def kept(self, case: dict[str, Any], layer: int) -> torch.Tensor:
        """Return the positions that kvpress kept, [B, Hkv, N], ascending."""
        return self.tensors[f"kept.{case['name']}.{layer}"].long()

    def scores(self, case: dict[str, Any], layer: int) -> torch.Tensor:
        """Return the scores that kvpress selected by, [B, Hkv, S]."""
        return self.tensors[f"{case['scores']}.{layer}"]

    def stored(self, part: str, case: dict[str, Any], layer: int) -> torch.Tensor | None:
        """Return the keys or values that kvpress left, in position order; None if they are those of the model."""
        return self.tensors.get(f"{part}.{case['name']}.{layer}")

    def full(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the uncompressed keys and values."""
        return self.tensors[f"full_keys.{layer}"], self.tensors[f"full_values.{layer}"]


@functools.cache
def metadata(path: Path) -> dict[str, Any]:
    """Metadata of a fixture, without its tensors (test collection needs no more)."""
    with safe_open(path, framework="pt") as file:
        parsed: dict[str, Any] = json.loads(file.metadata()["parity"])
    return parsed


@functools.cache
def reference(path: Path) -> Reference:
    """Load a fixture."""
    return Reference(metadata(path), load_file(path))


@functools.cache
def model_of(key: tuple[str, str, int]) -> Any:
    """Rebuild the model of a fixture; ``key`` is :attr:`Reference.model_key`."""
    arch, dtype, seed = key
    return tiny_model(arch, seed=seed, dtype=getattr(torch, dtype))


@functools.cache
def captured(key: tuple[str, str, int]) -> Any:
    """Capture once for all presses on a model."""
    return kvpass.capture_model(model_of(key))
