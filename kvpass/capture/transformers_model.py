"""Capture a causal LM of transformers through its public attention registry.

The only module that knows how transformers' models are built. The model is asked to attend with a function of ours
that emits one `scaled_dot_product_attention` a layer, KV heads not repeated; its own choice of attention is put back
afterwards, whatever happens.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from kvpass.capture.export import export_model
from kvpass.errors import UnsupportedModelError
from kvpass.ir.attention_op import ATTENTION
from kvpass.ir.masks import Sliding, prompt_mask

NAME = "kvpass"
# What a model may hand to its attention that no attention node expresses.
INEXPRESSIBLE = {
    "position_bias": "a bias of its own for every pair of tokens",
    "indices": "an indexer that picks for every token which others it sees",
    "head_mask": "a mask over heads",
}


class OwnAttentionError(UnsupportedModelError):
    """The model attends by code of its own, so its attention is found in the graph, not through the registry."""


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The order is that of transformers: who wraps attention, as kvpress does, passes on by place."""
    layer = getattr(module, "layer_idx", None)
    for name, meaning in INEXPRESSIBLE.items():
        if options.get(name) is not None:
            raise UnsupportedModelError(
                f"layer {layer} ({type(module).__name__}): attention uses {name!r}, {meaning}, which no attention node "
                "expresses"
            )
    if is_causal is False or getattr(module, "is_causal", True) is False:
        raise UnsupportedModelError(f"layer {layer} ({type(module).__name__}): attention is not causal")
    if attention_mask is None and (window := options.get("sliding_window")) is not None:
        attention_mask = prompt_mask(Sliding(int(window)), query.shape[2], query.device)
    out = _attention(query, key, value, attention_mask, scaling, options)
    return out.transpose(1, 2).contiguous(), None


def _attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, options: Mapping[str, Any]
) -> Tensor:
    """One attention node; a model calls its sinks [H] either `s_aux` or `sinks`."""
    grouped = query.shape[1] != key.shape[1]
    softcap, sinks = options.get("softcap"), options.get("s_aux")
    sinks = options.get("sinks") if sinks is None else sinks
    if softcap is None and sinks is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped
        )
    columns = () if sinks is None else (sinks.reshape(-1),)
    out: Tensor = ATTENTION(
        query, key, value, mask, 0.0, mask is None, *columns, scale=scaling, enable_gqa=grouped, softcap=softcap
    )
    return out


def _mask(*args: Any, **options: Any) -> Tensor | None:
    """The mask as transformers makes it for SDPA, written out: `normalize-attention` finds out what it is."""
    options |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return sdpa_mask(*args, **options)


@contextmanager
def attending_with(model: PreTrainedModel, *names: str) -> Iterator[str]:
    """Let `model` attend with the first of `names` that it has; yields what it attends with then.

    Its own implementation comes back on exit, also after exceptions.
    """
    previous = model.config._attn_implementation
    buffers = {name: (owner, leaf, t) for name, (owner, leaf, t) in _plain_tensors(model).items()}
    try:
        for name in names:
            with suppress(ValueError, ImportError):  # what transformers raises for an implementation that a model lacks
                model.set_attn_implementation(name)
            if model.config._attn_implementation == name:
                break
        yield model.config._attn_implementation
    finally:
        model.set_attn_implementation(previous)
        for owner, leaf, tensor in buffers.values():  # tracing may leave fake tensors behind (longrope)
            if getattr(owner, leaf) is not tensor:
                setattr(owner, leaf, tensor)


def _plain_tensors(model: nn.Module) -> dict[str, tuple[nn.Module, str, Tensor]]:
    """Buffers and tensor attributes of all modules."""
    found = {}
    for path, owner in model.named_modules():
        for leaf, value in {**owner.__dict__, **owner._buffers}.items():
            if isinstance(value, Tensor):
                found[f"{path}.{leaf}"] = (owner, leaf, value)
    return found


def export_transformers(model: PreTrainedModel, max_tokens: int) -> ExportedProgram:
    """Export through the registry; `OwnAttentionError` if the model does not use it. It must be in eval mode."""
    calls = 0

    def attend(*args: Any, **options: Any) -> tuple[Tensor, None]:
        nonlocal calls
        calls += 1
        return _attend(*args, **options)

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, _mask)
    with attending_with(model, NAME) as name:
        exported = _export_with_experts(model, max_tokens) if name == NAME else None
    if exported is None or not calls:
        raise OwnAttentionError(f"{type(model).__name__} has attention code of its own and ignores the registry")
    return exported


def _export_with_experts(model: PreTrainedModel, max_tokens: int) -> ExportedProgram:
    """Export; where grouped products cannot be (torch traces them in bfloat16 alone), with gathered weights.

    Newer releases of transformers see to that themselves. The model's own choice comes back.
    """
    fixed = {"use_cache": False}
    try:
        return export_model(model, fixed, max_tokens)
    except RuntimeError:
        own = getattr(model.config, "_experts_implementation", None)
        if own != "grouped_mm" or model.dtype is torch.bfloat16:
            raise
    try:
        model.set_experts_implementation("batched_mm")
        return export_model(model, fixed, max_tokens)
    finally:
        model.set_experts_implementation(own)


def max_tokens_of(model: nn.Module) -> int:
    """The longest text that the model's positions reach, 2**20 if its config does not say."""
    config = getattr(model, "config", None)
    if config is None:
        return 2**20
    text_config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    named = (getattr(text_config, name, None) for name in ("max_position_embeddings", "max_seq_len"))
    return int(next(filter(None, named), 2**20))
