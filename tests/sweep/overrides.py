"""What the one table of tiny field values does not fit: per model type."""

from typing import Any

LEFT_OUT: dict[str, str] = {
    **dict.fromkeys(
        ("gemma3", "gemma3n", "gemma4", "gemma4_unified", "got_ocr2", "moss_transcribe_diarize", "fuyu", "git"),
        "reads images or sound; a text class of its own holds its decoder",
    ),
    **dict.fromkeys(
        ("gemma4_assistant", "gemma4_unified_assistant"), "drafts with the cache of another model, has none of its own"
    ),
    **dict.fromkeys(("musicgen", "musicgen_melody"), "reads codes of sound"),
    "xlnet": "not causal: reads a permutation of the text",
}

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_TINY_BLT = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 96}
_TWO_KINDS = ["linear_attention", "full_attention"]

OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_d_head": 32, "attn_layer_indices": [1], "num_hidden_layers": 2},
    "bailing_hybrid": {"num_hidden_layers": 2, "layer_types": _TWO_KINDS, "mlp_layer_types": ["dense", "sparse"]},
    "blt": {
        "vocab_size": 260,
        "encoder_hash_byte_group_vocab": 100,
        "local_attention_window_len": 16,
        "patcher_config": _TINY_BLT,
        "encoder_config": {**_TINY_BLT, "hidden_size_global": 64},
        "decoder_config": {**_TINY_BLT, "hidden_size_global": 64},
        "global_config": _TINY_BLT,
    },
    "cohere_compass_text": {"rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v4": {"mlp_layer_types": None, "o_groups": 2, "o_lora_rank": 32},
    "dots3_note_text": {"num_key_value_heads": 4, "num_attention_heads": 4},
    "falcon": {"new_decoder_architecture": True},
    "gemma3n_text": {"num_kv_shared_layers": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gemma4_text": {"global_head_dim": 32},
    "gemma4_unified_text": {"global_head_dim": 32},
    "granitemoehybrid": {"mamba_d_head": 32, "num_hidden_layers": 2, "layer_types": _TWO_KINDS},
    "hrm_text": {"H_cycles": 2, "L_cycles": 2, "num_hidden_layers": 1},
    "jamba": {"num_hidden_layers": 2, "attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"head_dim": 8, "zero_expert_num": 2},
    "mamba2": {"head_dim": 32},
    "moshi": {"sliding_window": 16},
    "phi4_multimodal": {
        "vision_config": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
        "audio_config": {"hidden_size": 32, "intermediate_size": 32, "num_blocks": 1, "num_attention_heads": 2},
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "xlm": {"causal": True},
    "zamba": {
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "hybrid"],
        "num_hidden_layers": 4,
    },
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3},
    "zaya": {"num_experts_per_tok": 1},
}

# The same class with another form of attention.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "falcon": {
        "mqa": {"new_decoder_architecture": False, "multi_query": True},
        "alibi": {"new_decoder_architecture": False, "multi_query": False, "num_kv_heads": 4, "alibi": True},
    },
    "gemma3n_text": {"unshared": {"num_kv_shared_layers": 0}},
    "gemma4_text": {"shared": {"num_kv_shared_layers": 2}},
    "gpt_bigcode": {"mha": {"multi_query": False}},
    "mistral": {"window": {"sliding_window": 16}},
    "phi3": {"window": {"sliding_window": 16}},
    "stablelm": {"qk_norm": {"qk_layernorm": True, "use_parallel_residual": True}},
}
