"""Models of a known shape with random weights, so that nothing is downloaded."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3Config

from kvpass import smollm2
from kvpass.errors import InputError

_LLAMA: dict[str, Any] = {
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


def _configs() -> dict[str, PretrainedConfig]:
    return {
        "llama-3.2-1b": LlamaConfig(
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=64,
            tie_word_embeddings=True,
            **_LLAMA,
        ),
        "llama-3.1-8b": LlamaConfig(
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            **_LLAMA,
        ),
        "qwen3-0.6b": Qwen3Config(
            vocab_size=151936,
            hidden_size=1024,
            intermediate_size=3072,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
            tie_word_embeddings=True,
            max_position_embeddings=40960,
        ),
    }


def shape_names() -> list[str]:
    """What `--shape` takes."""
    return list(_configs())


def random_model(shape: str, dtype: torch.dtype, device: torch.device) -> Any:
    """A model of that shape with seeded random weights. Raises `InputError` for an unknown shape."""
    configs = _configs()
    if shape not in configs:
        raise InputError(f"there is no shape {shape!r}; shapes are {', '.join(configs)}")
    torch.manual_seed(0)
    made: Any = AutoModelForCausalLM  # any: its type hints let nobody call it
    with torch.device(device):
        model = made.from_config(configs[shape], dtype=dtype)
    return model.eval()


def loaded_model(name: str, dtype: torch.dtype, device: torch.device) -> Any:
    """A model of a folder, a hub id, or smollm2."""
    if name == "smollm2":
        return smollm2.load()[0].to(device=device, dtype=dtype).eval()
    made: Any = AutoModelForCausalLM
    model = made.from_pretrained(name, dtype=dtype)
    return model.to(device=device).eval()
