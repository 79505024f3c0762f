"""Tiny random models whose attention is not a plain scaled_dot_product_attention."""

from typing import Any

import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MptConfig,
    MptForCausalLM,
    PreTrainedModel,
)

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}
SHORT: dict[str, Any] = {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}
FALCON: dict[str, Any] = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def unusual_model(name: str, **options: Any) -> PreTrainedModel:
    """In eval mode, with weights sharp enough that attention looks somewhere."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = _make(name, options)
    generator = torch.Generator().manual_seed(0)
    for path, parameter in sorted(model.named_parameters()):
        if parameter.dim() > 1 or "sink" in path:
            spread = 0.5 if parameter.shape[0] == 128 or "sink" in path else 0.2
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    return model.eval()


def _make(name: str, options: dict[str, Any]) -> PreTrainedModel:
    match name:
        case "gemma2":  # soft-cap, every other layer with a window
            config = Gemma2Config(**SIZES, query_pre_attn_scalar=16, attn_logit_softcapping=3.0, sliding_window=16)
            return Gemma2ForCausalLM(config, **options)
        case "gpt_oss":  # sinks, every other layer with a window
            config = GptOssConfig(
                **SIZES, num_local_experts=2, num_experts_per_tok=1, sliding_window=16, pad_token_id=0
            )
            return GptOssForCausalLM(config)
        case "gptj":  # written out, for its own reasons
            return GPTJForCausalLM(GPTJConfig(**SHORT, rotary_dim=8))
        case "gpt2":
            return GPT2LMHeadModel(GPT2Config(**SHORT, **options))
        case "bloom":  # ALiBi, written out with bmm
            return BloomForCausalLM(BloomConfig(vocab_size=128, hidden_size=64, n_layer=2, n_head=4))
        case "mpt":  # ALiBi, written out with matmul and masked_fill
            return MptForCausalLM(MptConfig(vocab_size=128, d_model=64, n_layers=2, n_heads=4, max_seq_len=512))
        case "falcon":  # one KV head
            return FalconForCausalLM(FalconConfig(**FALCON, alibi=False, **options))
        case "falcon_alibi":  # a float mask given to SDPA, or written out
            return FalconForCausalLM(FalconConfig(**FALCON, alibi=True, multi_query=False, **options))
        case "diffllama":  # two attentions a layer, of the same queries over the same keys
            return DiffLlamaForCausalLM(DiffLlamaConfig(**SIZES, **options))
    raise ValueError(name)
