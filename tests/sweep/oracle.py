"""What a model says that has lost some key/value pairs, computed by transformers alone.

A compressed cache lacks pairs that later tokens would have read. The eager model says the same when it reads the whole
text at once and those tokens cannot see those pairs: minus infinity in the logits of their attention. That is put in
front of every softmax over the text, whoever wrote the attention code, so that no class needs code of its own here.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

_OVER_LOGITS = (torch.ops.aten._softmax, torch.ops.aten._safe_softmax, torch.ops.aten.logsumexp)


class OracleError(Exception):
    """The oracle does not understand the model: nothing is known about kvpass."""


def logits_without(model: PreTrainedModel, ids: Tensor, hidden: Sequence[Tensor | None] | None) -> Tensor:
    """Logits [B, n, V] of the text `ids` [B, n].

    hidden: for the n-th attention bool[B, Hkv, P], which of the first P tokens the tokens behind them do not see; None
    hides nothing there, or nowhere. Attention runs as the class itself writes it ("eager").
    """
    if hidden is None:
        return _logits(model, ids, _Hiding(None, ids.shape[1]))
    counting = _Hiding(None, ids.shape[1])
    _logits(model, ids, counting)
    times, rest = divmod(counting.seen, len(hidden))
    if rest or not times:
        raise OracleError(f"the eager model has {counting.seen} attentions, the compiled one {len(hidden)}")
    # One that is computed in parts (differential attention) hides the same tokens in each of them.
    return _logits(model, ids, _Hiding([layer for layer in hidden for _ in range(times)], ids.shape[1]))


def _logits(model: PreTrainedModel, ids: Tensor, hiding: "_Hiding") -> Tensor:
    previous = model.config._attn_implementation
    try:
        model.set_attn_implementation("eager")
        positions = torch.arange(ids.shape[1])[None].expand(ids.shape)
        # SDPA that a class calls by itself must go through a softmax that can be seen.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), hiding:
            return eager_logits(model, ids, positions)
    finally:
        model.set_attn_implementation(previous)


def eager_logits(model: PreTrainedModel, ids: Tensor, positions: Tensor | None = None) -> Tensor:
    """Logits [B, n, V] without a cache; positions are given to classes that take them."""
    given: dict[str, Any] = {"input_ids": ids}
    takes = inspect.signature(model.forward).parameters
    if positions is not None and "position_ids" in takes:
        given["position_ids"] = positions
    with torch.no_grad():
        result = model(**given, use_cache=False)
    logits: Tensor = result.logits
    return logits


def hidden_from(positions: Tensor, prompt: int) -> Tensor:
    """Turn the positions i64[B, Hkv, n] that a layer kept of a prompt into the ones it lacks, bool[B, Hkv, prompt]."""
    lacks = torch.ones(*positions.shape[:2], prompt + 1, dtype=torch.bool)
    lacks.scatter_(2, positions.masked_fill(positions < 0, prompt), value=False)
    return lacks[..., :prompt]


class _Hiding(TorchDispatchMode):
    """Puts minus infinity into the logits of attentions, which are counted in the order of their calls."""

    def __init__(self, hidden: Sequence[Tensor | None] | None, tokens: int) -> None:
        super().__init__()
        self._hidden = hidden
        self._tokens = tokens
        self._calls = dict.fromkeys(_OVER_LOGITS, 0)

    @property
    def seen(self) -> int:
        """How many attentions there were."""
        return self._calls[_OVER_LOGITS[0]] + self._calls[_OVER_LOGITS[1]]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        if packet in self._calls and self._over_the_text(args[0]):
            call = self._calls[packet]
            self._calls[packet] += 1
            if self._hidden is not None and call < len(self._hidden) and self._hidden[call] is not None:
                args = (self._masked(args[0], self._hidden[call]), *args[1:])
        return func(*args, **(kwargs or {}))

    def _over_the_text(self, logits: Tensor) -> bool:
        """Whether every token has a logit for every token, and perhaps one more for a sink."""
        if logits.dim() < 3:
            return False
        queries, keys = logits.shape[-2:]
        return queries == self._tokens and keys in (self._tokens, self._tokens + 1)

    def _masked(self, logits: Tensor, hidden: Any) -> Tensor:
        batch, kv_heads, prompt = hidden.shape
        shaped = logits.reshape(batch, -1, *logits.shape[-2:])  # some classes fold the heads into the batch
        if shaped.shape[1] % kv_heads:
            raise OracleError(f"{shaped.shape[1]} heads read {kv_heads} heads of keys")
        missing = hidden.repeat_interleave(shaped.shape[1] // kv_heads, dim=1)
        mask = torch.zeros(shaped.shape, dtype=torch.bool)
        mask[:, :, prompt:, :prompt] = missing[:, :, None]
        return shaped.masked_fill(mask, float("-inf")).reshape(logits.shape)
