"""bfloat16 attention in blocks: the numbers of torch's kernel, and only where it stands for it."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import LlamaConfig, LlamaForCausalLM

import kvpass
from kvpass.backends import blocked_attention as blocked
from kvpass.backends.blocked_attention import attend_in_blocks, blocked_attention

TOKENS = blocked.TOKENS + 131  # not a multiple of a block


def tensors(batch: int, heads: int, groups: int, channels: int, tokens: int = TOKENS) -> tuple[Tensor, Tensor, Tensor]:
    """With large scores: what all keys have in common, and a first token that most attend to, as in trained models."""
    torch.manual_seed(0)
    query = torch.randn(batch, tokens, heads, channels).transpose(1, 2) * 2
    key = torch.randn(batch, tokens, groups, channels).transpose(1, 2) + 2 * query.mean((1, 2), keepdim=True).sign()
    key[:, :, 0] *= 2
    value = torch.randn(batch, tokens, groups, channels).transpose(1, 2)
    return query.bfloat16(), key.bfloat16(), value.bfloat16()


def error(found: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> float:
    """Root mean square of the distance from attention in float64."""
    exact = sdpa(query.double(), key.double(), value.double(), is_causal=True, scale=scale, enable_gqa=True)
    return float((found.double() - exact).square().mean().sqrt())


@pytest.mark.parametrize(
    ("batch", "heads", "groups", "channels", "scale"),
    [(1, 6, 2, 64, None), (2, 2, 2, 32, 0.15), (1, 3, 1, 128, None)],
    ids=["groups", "batch and scale", "one KV head"],
)
def test_it_is_as_exact_as_one_rounding(
    batch: int, heads: int, groups: int, channels: int, scale: float | None
) -> None:
    query, key, value = given = tensors(batch, heads, groups, channels)
    found = blocked_attention(*given, scale)
    kernel = sdpa(*given, is_causal=True, scale=scale, enable_gqa=True)
    assert error(found, *given, scale) < 3 * error(kernel, *given, scale)
    scores = query @ key.repeat_interleave(heads // groups, 1).mT * (channels**-0.5 if scale is None else scale)
    scores.masked_fill_(torch.ones(TOKENS, TOKENS).triu(1).bool(), float("-inf"))
    rounded = scores.softmax(-1) @ value.repeat_interleave(heads // groups, 1)
    assert error(found, *given, scale) < 0.6 * error(rounded, *given, scale), "rounded scores would do as well"


def test_a_large_score_of_a_later_token_does_not_count() -> None:
    """Tokens before it are as exact as without it, though it is one of those that are looked at."""
    late = blocked.SINKS + 50 * -(-TOKENS // blocked.SPACED)
    query, key, value = tensors(1, 2, 1, 32)
    query[..., 0] = 8
    key[:, :, late] = 0
    key[:, :, late, 0] = 40
    found, kernel = blocked_attention(query, key, value, None), sdpa(query, key, value, is_causal=True, enable_gqa=True)
    before = [tensor[:, :, :late] for tensor in (query, key, value)]
    assert error(found[:, :, :late], *before) < 3 * error(kernel[:, :, :late], *before)


@pytest.mark.parametrize("tokens", [1, 700])
def test_short_prompts_are_the_kernels(tokens: int) -> None:
    given = tensors(2, 4, 2, 16, tokens)
    torch.testing.assert_close(
        blocked_attention(*given, None), sdpa(*given, is_causal=True, enable_gqa=True), atol=0, rtol=0
    )


@pytest.mark.parametrize("tokens", [8, TOKENS])
def test_the_operator_is_what_its_fake_says(tokens: int) -> None:
    operator = torch.ops.kvpass.blocked_attention.default
    torch.library.opcheck(operator, (*tensors(1, 4, 2, 16, tokens), None), test_utils="test_faketensor")


def test_only_bfloat16_without_a_mask_is_replaced() -> None:
    graph = torch.fx.Graph()
    query, key, value, mask = (graph.placeholder(name) for name in ("query", "key", "value", "mask"))
    attention = torch.ops.aten.scaled_dot_product_attention.default
    for dtype, rest, options in (
        (torch.bfloat16, (None, 0.0, True), {"scale": 0.5, "enable_gqa": True}),
        (torch.float32, (None, 0.0, True), {}),
        (torch.bfloat16, (mask,), {}),
        (torch.bfloat16, (), {}),
    ):
        graph.call_function(attention, (query, key, value, *rest), options).meta["dtype"] = dtype
    assert attend_in_blocks(graph) == 1
    targets = [node.target for node in graph.nodes if node.op == "call_function"]
    assert targets == [torch.ops.kvpass.blocked_attention.default, *[attention] * 3]
    assert next(n for n in graph.nodes if n.target is targets[0]).args == (query, key, value, 0.5)


def test_a_model_attends_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled as on a CPU where it pays, whatever this one is."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2 * TOKENS,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().to(torch.bfloat16)
    blocks = []
    attend = blocked._attend
    monkeypatch.setattr(blocked, "_attend", lambda *tensors: (blocks.append(1), attend(*tensors)))
    ids = torch.randint(0, 64, (1, TOKENS))
    logits = {}
    for pays in (False, True):
        monkeypatch.setattr(blocked, "pays", lambda pays=pays: pays)
        compiled = kvpass.compile(model, "knorm", 0.5)
        with torch.no_grad():
            logits[pays] = compiled(ids).logits[0, -1].float()
        # The last layer is narrowed to the last token.
        assert len(blocks) == (2 * config.num_key_value_heads if pays else 0)
    torch.testing.assert_close(logits[True], logits[False], atol=0.02, rtol=0.02)
