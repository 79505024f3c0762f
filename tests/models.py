"""Models that many tests share; capturing one takes seconds, so each is captured once."""

import functools

import torch
from tiny_models import tiny_model
from transformers import PreTrainedModel

import kvpass


@functools.cache
def eager_model(arch: str) -> PreTrainedModel:
    """The tiny random model of an architecture; shared, do not change it."""
    return tiny_model(arch)


@functools.cache
def captured_model(arch: str) -> kvpass.CapturedModel:
    return kvpass.capture_model(eager_model(arch))


def compiled_model(arch: str, press: "str | kvpass.Press | None" = None, **options: object) -> kvpass.CompiledModel:
    """Compiled with the eager backend, which shows the same graphs without a compiler's minutes."""
    return kvpass.compile(captured_model(arch), press=press, **{"backend": "eager", **options})  # type: ignore[arg-type]


def token_ids(batch: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """Random token ids i64[batch, tokens] that are no special tokens."""
    return torch.randint(3, 250, (batch, tokens), generator=torch.Generator().manual_seed(seed))
