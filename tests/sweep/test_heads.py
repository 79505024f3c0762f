"""How queries, keys and values come about: a part of the sweep, an architecture for each form."""

import pytest

from .asserting import assert_equal

FORMS = {
    "llama": "snapkv",  # grouped heads
    "gpt_bigcode": "streaming_llm",  # one KV head, fused, learned positions
    "gpt_neox": "snapkv",  # fused, partial RoPE
    "gpt2": "expected_attention",  # fused with transposed weights, learned positions
    "phi3": "expected_attention",  # fused
    "olmo2": "streaming_llm",  # norm over the full width of q and k
    "qwen3_moe": "knorm",  # norm per head, experts
    "mixtral": "snapkv",  # experts
    "deepseek_v3": "knorm",  # MLA
    "gemma3n_text": "snapkv",  # keys that layers share, of windows and of the whole text
    "gemma4_text": "expected_attention",  # head sizes differ between layers, RoPE before heads and tokens change places
}


@pytest.mark.parametrize(("name", "press"), FORMS.items())
def test_decodes_like_the_eager_model_without_those_pairs(name: str, press: str) -> None:
    assert_equal(name, press)
