"""Where tokens are and which ones they see: a part of the sweep, an architecture for each form."""

import pytest

from .asserting import assert_equal
from .check import Outcome, check
from .configs import architectures

FORMS = {
    "opt": ("knorm", "2 causal"),  # learned positions with an offset
    "glm": ("snapkv", "2 causal"),  # interleaved and partial RoPE
    "cohere": ("streaming_llm", "2 causal"),  # interleaved RoPE
    "smollm3": ("knorm", "1 causal, 1 window 16"),  # no RoPE in some layers
    "qwen3": ("snapkv", "1 causal, 1 window 16"),  # windows in some layers
    "qwen2_moe": ("streaming_llm", "1 causal, 1 window 16"),  # its attention is not told of its window
    "llama4_text": ("snapkv", "1 causal, 1 chunk 16"),  # chunks, RoPE by complex numbers
    "gemma3_text": ("streaming_llm", "1 causal, 1 window 16"),  # a RoPE table for each kind of layer
}


@pytest.mark.parametrize(("name", "press", "masks"), [(name, *form) for name, form in FORMS.items()])
def test_decodes_like_the_eager_model_without_those_pairs(name: str, press: str, masks: str) -> None:
    assert assert_equal(name, press).masks == masks


def test_windows_everywhere_leave_nothing_to_press() -> None:
    result = check(architectures()[0]["mistral+window"], ["none", "knorm"])
    assert [verdict.outcome for verdict in result.verdicts.values()] == [Outcome.EQUAL, Outcome.REFUSED]
    assert "every layer of this model has a sliding window" in result.verdicts["knorm"].reason
