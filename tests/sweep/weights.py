"""Weights that make errors show.

The default initialisation (std 0.02) makes attention nearly uniform, so that it hardly matters what a cache holds.
"""

import math
import re
import zlib

import torch
from transformers import PreTrainedModel

from .configs import Architecture

_QUERIES_AND_KEYS = re.compile(r"(^|[._])(q|k|wq|wk|query|key|qkv|Wqkv|c_attn|query_key_value)([._]|$)")
_SHARPER = 1.6  # queries and keys are larger by this, attention logits by its square


def sweep_model(architecture: Architecture, seed: int = 0) -> PreTrainedModel:
    """The tiny model of an architecture, float32, in eval mode, with seeded weights of unit scale."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = architecture.model_class(architecture.config())
    generator = torch.Generator().manual_seed(zlib.crc32(f"{architecture.name}/{seed}".encode()))
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        sharper = _SHARPER if _QUERIES_AND_KEYS.search(name) else 1.0
        if parameter.dim() < 2:  # norms stay about 1, or 0 where the class adds 1; so do decays, biases and sinks
            centre = parameter.data.float()
            parameter.data = (centre * (sharper if "norm" in name else 1.0) + 0.1 * noise).to(parameter.dtype)
        elif "emb" in name or "wte" in name or "wpe" in name:
            parameter.data = (noise * _embedding_scale(model)).to(parameter.dtype)
        else:
            parameter.data = (noise * sharper / math.sqrt(min(parameter.shape[-2:]))).to(parameter.dtype)
        parameter.requires_grad_(False)
    return model.float().eval()  # type: ignore[no-any-return]


def _embedding_scale(model: PreTrainedModel) -> float:
    """1, or less where the logits are made with the embeddings."""
    return 0.25 if getattr(model.config.get_text_config(decoder=True), "tie_word_embeddings", False) else 1.0
