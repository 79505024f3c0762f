"""Tiny random causal LMs, the same bits under every supported transformers release.

A fixture that was written with one transformers release is only worth something if another
release can rebuild the model it was written with. So nothing here is left to a default that may
change: every config field that matters is given, and every parameter is drawn again from an
explicit generator after construction. :func:`weights_checksum` says whether that worked.

The default initialisation (std 0.02) makes attention nearly uniform: all scores lie within
rounding of each other and a test of "which tokens are kept" tests nothing. The scales below give
attention logits a standard deviation of about 2.
"""

from __future__ import annotations

import hashlib
import math
import zlib
from typing import Any

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

ARCHITECTURES: tuple[str, ...] = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma3_text")

_CLASSES: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "phi3": (Phi3Config, Phi3ForCausalLM),
    "gemma3_text": (Gemma3TextConfig, Gemma3ForCausalLM),
}


def tiny_model(
    arch: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **config_overrides: Any,
) -> PreTrainedModel:
    """Build a tiny random model of one architecture, in eval mode, on the CPU.

    The weights depend on ``arch``, ``seed`` and the overrides that change a shape, on nothing
    else; they are drawn in float32 and then cast to ``dtype``. ``config_overrides`` go to the
    config as they are (``num_hidden_layers=1``, ``attn_implementation="eager"``, ...).
    """
    if arch not in _CLASSES:
        raise ValueError(f"unknown architecture {arch!r}; known: {', '.join(ARCHITECTURES)}")
    config_class, model_class = _CLASSES[arch]
    model: PreTrainedModel
    with torch.random.fork_rng(devices=[]):  # construction draws weights that are thrown away
        model = model_class(config_class(**_config_fields(arch, config_overrides)))
    _redraw(model, arch, seed)
    # Only parameters are cast: model.to(bfloat16) would round the RoPE frequencies as well, which
    # from_pretrained(dtype=bfloat16) does not do.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
        parameter.requires_grad_(False)
    model.config.dtype = dtype
    model.train(mode=False)
    return model


def weights_checksum(model: PreTrainedModel) -> str:
    """Return the sha256 over names, shapes, dtypes and bytes of the state dict.

    Names are taken in sorted order. A tensor that appears under several names (tied embeddings)
    counts once, under the first of them, so that it does not matter whether a release lists tied
    weights once or twice.
    """
    digest = hashlib.sha256()
    seen: set[int] = set()
    for name, tensor in sorted(model.state_dict().items()):
        if tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _config_fields(arch: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """Every config field that shapes the graph, so that no default can move it."""
    fields: dict[str, Any] = {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        # No end-of-sequence id: greedy decoding of a random model must run to its length limit.
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    if arch == "mistral":
        fields |= {"sliding_window": None}
    elif arch in ("qwen2", "qwen3"):
        fields |= {"use_sliding_window": False, "sliding_window": None}
    elif arch == "phi3":
        fields |= {"sliding_window": None, "original_max_position_embeddings": 4096}
        del fields["head_dim"]  # not a field of Phi3's config: hidden_size / num_attention_heads
    elif arch == "gemma3_text":
        fields |= {
            "num_hidden_layers": 4,
            "query_pre_attn_scalar": 16,
            "sliding_window": 16,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
            },
        }
    fields |= overrides
    if arch == "gemma3_text" and "layer_types" not in overrides:
        fields["layer_types"] = [
            "full_attention" if layer % 2 else "sliding_attention" for layer in range(fields["num_hidden_layers"])
        ]
    return fields


def _redraw(model: PreTrainedModel, arch: str, seed: int) -> None:
    """Give every parameter a new value, in sorted name order, tied parameters once."""
    # The architecture goes into the seed: Llama and Mistral have the same names and shapes, and two
    # copies of one model would be one test run twice.
    generator = torch.Generator(device="cpu").manual_seed(zlib.crc32(f"{arch}/{seed}".encode()))
    for name, parameter in sorted(model.named_parameters()):
        centre, spread = _scale(name, arch)
        noise = _bell(tuple(parameter.shape), generator)
        parameter.data.copy_((centre + spread * noise).to(torch.float32))


def _scale(name: str, arch: str) -> tuple[float, float]:
    """Mean and standard deviation of one parameter."""
    gemma = arch == "gemma3_text"
    if name.endswith("norm.weight"):
        # Gemma multiplies by (1 + weight). Where queries and keys are normalised per head, their
        # scale is the only thing that can sharpen the attention.
        centre = 1.5 if name.endswith(("q_norm.weight", "k_norm.weight")) else 1.0
        return (centre - 1.0 if gemma else centre), 0.1
    if name.endswith("bias"):
        return 0.0, 0.1
    if "embed_tokens" in name:
        return 0.0, 0.2 if gemma else 1.0  # Gemma multiplies embeddings by sqrt(hidden_size)
    return 0.0, 0.2


def _bell(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Zero-mean, unit-variance, roughly normal float64 noise.

    A scaled sum of four uniform 16-bit integers rather than ``torch.randn``: the latter takes
    logarithms and cosines whose last bit depends on the CPU's vector units.
    """
    total = torch.randint(0, 2**16, (4, *shape), generator=generator).sum(0)
    deviation = math.sqrt(4 * (2**32 - 1) / 12)
    return (total - 2 * (2**16 - 1)).to(torch.float64) / deviation
