"""Capture a causal LM of transformers through its public attention registry.

The only module that knows how transformers' models are built. The model is asked to attend with a function of ours
that emits one `scaled_dot_product_attention` a layer, KV heads not repeated; its own choice of attention is put back
afterwards, whatever happens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from kvpass.capture.export import export_model
from kvpass.errors import UnsupportedModelError
from kvpass.ir.masks import Sliding, prompt_mask

NAME = "kvpass"
# What a model may hand to its attention that plain SDPA cannot express.
INEXPRESSIBLE = ("softcap", "s_aux", "sinks", "position_bias", "indices", "head_mask")


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    layer = getattr(module, "layer_idx", None)
    for name in INEXPRESSIBLE:
        if options.get(name) is not None:
            raise UnsupportedModelError(
                f"layer {layer} ({type(module).__name__}): attention uses {name!r}, which a "
                "scaled_dot_product_attention node cannot express"
            )
    if is_causal is False or getattr(module, "is_causal", True) is False:
        raise UnsupportedModelError(f"layer {layer} ({type(module).__name__}): attention is not causal")
    if attention_mask is None and (window := options.get("sliding_window")) is not None:
        attention_mask = prompt_mask(Sliding(int(window)), query.shape[2], query.device)
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        is_causal=attention_mask is None,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2).contiguous(), None


def _mask(*args: Any, **options: Any) -> Tensor | None:
    """The mask as transformers makes it for SDPA, written out: `normalize-attention` finds out what it is."""
    options |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return sdpa_mask(*args, **options)


@contextmanager
def attending_with_kvpass(model: PreTrainedModel) -> Iterator[None]:
    """Let `model` attend with `_attend`; its own implementation comes back on exit, also after exceptions."""
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _mask)
    previous = model.config._attn_implementation
    buffers = {name: (owner, leaf, t) for name, (owner, leaf, t) in _plain_tensors(model).items()}
    try:
        model.set_attn_implementation(NAME)
        if model.config._attn_implementation != NAME:
            raise UnsupportedModelError(
                f"{type(model).__name__} has attention code of its own and ignores set_attn_implementation"
            )
        yield
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
    """Export through the registry. The model must be in eval mode."""
    with attending_with_kvpass(model):
        return export_model(model, {"use_cache": False}, max_tokens)


def max_tokens_of(model: nn.Module) -> int:
    """The longest text that the model's positions reach, 2**20 if its config does not say."""
    config = getattr(model, "config", None)
    if config is None:
        return 2**20
    text_config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    return int(getattr(text_config, "max_position_embeddings", None) or 2**20)
