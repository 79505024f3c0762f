"""The distance between what a model says with a compressed and with the whole context."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from kvpass.api import CapturedModel, compile
from kvpass.press import Press
from kvpass.runtime.cache import CompressedCache


@dataclass(frozen=True)
class Text:
    """A context that is compressed, and what follows it. i64[1, S] and i64[1, T]"""

    context: Tensor
    continuation: Tensor


@dataclass(frozen=True)
class Divergence:
    """Mean KL divergence of the next-token distributions over the continuation, in nats; and what was removed."""

    mean: float
    removed: float  # fraction of the pairs of all layers


def reference_logits(model: CapturedModel, text: Text) -> Tensor:
    """Logits after each token of the continuation with nothing dropped. [1, T, V]"""
    whole = compile(model, press=None, backend="eager")
    cache = whole.prefill(text.context).past_key_values
    logits: Tensor = whole(input_ids=text.continuation, past_key_values=cache).logits
    return logits


def divergences(
    model: CapturedModel,
    press: Press,
    ratios: Sequence[float],
    text: Text,
    expected: Tensor,
    *,
    question_tokens: int = 64,
) -> list[Divergence]:
    """One value per ratio; a press that takes no ratio gives one value.

    The graphs run operator by operator, which is exact and compiles nothing. `question_tokens` is what a press like
    finch is told to be the question: the end of the context.
    """
    found = []
    compiled = compile(model, press, ratios[0] if press.needs_budget else None, backend="eager")
    for ratio in ratios if press.needs_budget else (0.0,):
        if press.needs_budget:
            compiled.set_budget(ratio=ratio)
        question = question_tokens if press.needs_question else None
        cache = compiled.prefill(text.context, question_tokens=question).past_key_values
        assert isinstance(cache, CompressedCache)
        kept = sum(cache.kept(layer) for layer in range(len(cache)))
        logits = compiled(input_ids=text.continuation, past_key_values=cache).logits
        removed = 1 - kept / (len(cache) * text.context.shape[1])
        found.append(Divergence(kl_divergence(expected, logits), removed))
    return found


def kl_divergence(expected: Tensor, found: Tensor) -> float:
    """Mean over tokens of sum p (log p - log q), p the softmax of `expected`. [1, T, V] each"""
    p, q = (logits.double().log_softmax(dim=-1) for logits in (expected, found))
    return float((p.exp() * (p - q)).sum(dim=-1).mean())
