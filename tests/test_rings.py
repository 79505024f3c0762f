"""Layers of windows or chunks: a ring of what a token can reach, exact at every turn."""

import itertools
from typing import Any

import pytest
import torch
from models import token_ids
from tiny_models import tiny_model
from torch import Tensor

import kvpass
from kvpass.errors import CacheError
from kvpass.ir.masks import Causal, Chunked, Sliding, classify, prompt_mask, ring_positions

REACH = 16


class Written(torch.nn.Module):
    """Two layers, the first one with this mask, the second a full one."""

    def __init__(self, mask: Causal) -> None:
        super().__init__()
        self.mask = mask
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(64, 32)
        self.where = torch.nn.Embedding(512, 32)
        self.qkv = torch.nn.ModuleList(torch.nn.Linear(32, 64) for _ in range(2))
        self.out = torch.nn.ModuleList(torch.nn.Linear(32, 32) for _ in range(2))
        self.head = torch.nn.Linear(32, 64)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x = self.embed(input_ids) + self.where(position_ids)
        number = torch.arange(input_ids.shape[1])
        for layer in range(2):
            q, k, v = self.qkv[layer](x).split([32, 16, 16], dim=-1)
            q, k, v = (t.unflatten(-1, (-1, 8)).transpose(1, 2) for t in (q, k, v))
            mask = (self.mask if layer == 0 else Causal()).allowed(number[:, None], number)
            mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
            x = x + self.out[layer](mixed.transpose(1, 2).flatten(2))
        return self.head(x)


@pytest.mark.parametrize("mask", [Sliding(REACH), Chunked(REACH)], ids=str)
def test_a_ring_is_exact_at_every_turn(mask: Causal) -> None:
    """Prompt shorter and longer than the ring, pieces shorter and longer than it, single tokens, rewind, copy."""
    module = Written(mask).eval()
    model = kvpass.compile(module, backend="eager")
    ids = token_ids(2, 140) % 64
    with torch.no_grad():
        expected = module(ids, torch.arange(140).expand(2, -1))
    for first in (3, 16, 21, 70):
        out = model.prefill(ids[:, :first])
        cache = out.past_key_values
        torch.testing.assert_close(out.logits, expected[:, first - 1 : first], atol=1e-4, rtol=1e-4)
        for _ in range(2):  # once more behind rewind()
            for start, end in itertools.pairwise([first, first + 1, first + 5, first + 6, first + 40, first + 41, 140]):
                logits = model(input_ids=ids[:, start:end], past_key_values=cache).logits
                torch.testing.assert_close(logits, expected[:, start:end], atol=1e-4, rtol=1e-4)
                assert cache.buffers(0)[0].shape[2] == REACH == min(cache.kept(0), end) + max(0, REACH - end)
                assert cache.positions(0)[0, 0].tolist() == list(range(max(0, end - REACH), end))
            cache = cache.rewind().copy()


def test_classification() -> None:
    for length in (48, 61):
        for kind in (Causal(), Sliding(1), Sliding(16), Sliding(47), Chunked(16), Chunked(7)):
            assert classify(prompt_mask(kind, length, torch.device("cpu"))[None]) == kind
        strided = torch.ones(length, length).tril().bool() & (torch.arange(length) % 2 == 0)
        assert classify(strided[None]) is None
        assert classify(torch.ones(1, length, length, dtype=torch.bool)) is None
    found = ring_positions(torch.tensor([-1, 2, 7, 8]), 4, 4)
    assert found.tolist() == [[-4, -3, -2, -1], [0, 1, 2, -1], [4, 5, 6, 7], [8, 5, 6, 7]]


def test_chunks_of_transformers() -> None:
    """Llama 4's text model: chunked layers among full ones without RoPE."""
    eager = tiny_llama4()
    model = kvpass.compile(eager, "knorm", ratio=0.0, backend="eager")
    ids = token_ids(2, 75)
    with torch.no_grad():
        expected = eager(ids).logits
    cache = (out := model.prefill(ids[:, :37])).past_key_values
    torch.testing.assert_close(out.logits, expected[:, 36:37], atol=1e-4, rtol=1e-4)
    for start, end in itertools.pairwise([37, 38, 44, 70, 71, 75]):
        logits = model(input_ids=ids[:, start:end], past_key_values=cache).logits
        torch.testing.assert_close(logits, expected[:, start:end], atol=1e-4, rtol=1e-4)
    assert [layer.ring for layer in cache.layout.layers] == [16, 16, None]


def tiny_llama4() -> Any:
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    torch.manual_seed(0)
    config = Llama4TextConfig(
        vocab_size=256, hidden_size=64, intermediate_size=64, intermediate_size_mlp=64, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_local_experts=2, num_experts_per_tok=1,
        attention_chunk_size=REACH, max_position_embeddings=512, no_rope_layers=[1, 1, 0], pad_token_id=0,
        layer_types=["chunked_attention", "chunked_attention", "full_attention"], moe_layers=[1],
    )  # fmt: skip
    return Llama4ForCausalLM(config).eval()


def test_what_a_ring_has_lost_cannot_be_cropped_to() -> None:
    model = kvpass.compile(tiny_model("gemma3_text"), backend="eager")
    ids = token_ids(1, 40)
    cache = model.prefill(ids[:, :10]).past_key_values
    model(input_ids=ids[:, 10:14], past_key_values=cache)
    expected = model(input_ids=ids[:, 14:20], past_key_values=cache.copy()).logits
    cache.crop(12)  # nothing was overwritten yet
    model(input_ids=ids[:, 12:14], past_key_values=cache)
    torch.testing.assert_close(model(input_ids=ids[:, 14:20], past_key_values=cache).logits, expected)
    with pytest.raises(CacheError, match="a window of 16 tokens has moved on"):
        cache.crop(15)
    cache.crop(10)  # the end of the context: as rewind()
    assert cache.positions(0)[0, 0].tolist() == list(range(10))


def test_a_ring_survives_a_file(tmp_path: Any) -> None:
    model = kvpass.compile(tiny_model("gemma3_text"), "streaming_llm", ratio=0.5, backend="eager")
    ids = token_ids(2, 60)
    cache = model.prefill(ids[:, :40]).past_key_values
    model(input_ids=ids[:, 40:47], past_key_values=cache)
    cache.save(tmp_path / "cache.safetensors")
    loaded = kvpass.CompressedCache.load(tmp_path / "cache.safetensors")
    for _ in range(2):
        found, expected = (model(input_ids=ids[:, 47:], past_key_values=c).logits for c in (loaded, cache))
        assert torch.equal(found, expected)
        loaded.rewind(), cache.rewind()
