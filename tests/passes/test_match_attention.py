"""Attention that is written out is recognised by what it computes; what only looks like it is not."""

import pytest
import torch
import torch.nn.functional as F
from modules import PlainAttentionLayer, PlainLM
from torch import Tensor, nn

import kvpass
from kvpass.capture import capture
from kvpass.errors import UnsupportedModelError
from kvpass.ir.attention_op import ATTENTION
from kvpass.ir.attention_site import SDPA, attention_sites
from kvpass.ir.printer import graph_text
from kvpass.pass_manager import PassManager
from kvpass.passes.drop_noops import DropNoops
from kvpass.passes.match_attention import MatchAttention
from kvpass.pipeline import capture_passes


class WrittenOut(PlainAttentionLayer):
    """`style` says how, or what is odd about it."""

    def __init__(self, style: str) -> None:
        super().__init__(style)
        self.sinks = nn.Parameter(torch.tensor([0.5, -1.0, 2.0, 0.0]))
        self.slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, heads, tokens, width = q.shape
        if self.style != "grouped":
            k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
        position = torch.arange(tokens, device=q.device)
        seen = position <= position[:, None]
        bias = torch.zeros(tokens, tokens).masked_fill(~seen, torch.finfo(q.dtype).min)
        match self.style:
            case "matmul":
                weights = (q / 2.5 @ k.transpose(2, 3)).masked_fill(~seen, -1e9).softmax(-1)
                return F.dropout(weights, 0.1, self.training) @ v
            case "einsum":
                q, k, v = (t.transpose(1, 2) for t in (q, k, v))
                weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.3 + bias).softmax(-1)
                return torch.einsum("bhqk,bkhd->bqhd", weights, v).transpose(1, 2)
            case "bmm":
                q, k, v = (t.reshape(batch * heads, tokens, width) for t in (q, k, v))
                scores = torch.baddbmm(bias.expand(batch * heads, -1, -1), q, k.transpose(1, 2), alpha=0.3)
                return (scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v).view(batch, heads, tokens, width)
            case "grouped":
                q, k, v = q.unflatten(1, (2, 2)), k.unsqueeze(2), v.unsqueeze(2)
                return (((q @ k.transpose(3, 4)) * 0.3 + bias).softmax(-1) @ v).flatten(1, 2)
            case "cap and sinks":
                scores = 5 * torch.tanh(q @ k.transpose(2, 3) * 0.3 / 5) + bias
                sinks = self.sinks.view(1, -1, 1, 1).expand(batch, -1, tokens, -1)
                scores = torch.cat([scores, sinks], dim=-1)
                return (scores - scores.amax(-1, keepdim=True)).softmax(-1)[..., :-1] @ v
            case "slopes":
                distance = self.slopes[:, None, None] * (position - position[:, None])
                return (q @ k.transpose(2, 3) * 0.3 + distance + bias).softmax(-1) @ v
            case "window":
                near = seen & (position > position[:, None] - 16)
                return torch.where(near, q @ k.transpose(2, 3), -1e9).softmax(-1) @ v
            case "content":
                liked = seen & ((v.mean((1, 3)) > 0)[:, None, None] | (position == position[:, None]))
                return (q @ k.transpose(2, 3)).masked_fill(~liked, -1e9).softmax(-1) @ v
            case "squared":
                return ((q @ k.transpose(2, 3)) ** 2 + bias).softmax(-1) @ v
            case "noisy":  # one more term that distance does not explain
                return (q @ k.transpose(2, 3) + bias + (position % 3).to(q.dtype)).softmax(-1) @ v
            case "wrong way":  # normalised over the queries
                return (q @ k.transpose(2, 3) + bias).softmax(-2) @ v
            case "pooling":  # no product in front
                return (k.sum(-1, keepdim=True).transpose(2, 3) + bias).softmax(-1) @ v
        raise ValueError(self.style)


def written_out(*styles: str) -> PlainLM:
    model = PlainLM(*("causal" for _ in styles))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model.layers = nn.ModuleList(WrittenOut(style) for style in styles)
    return model.eval()


FORMS = ["matmul", "einsum", "bmm", "grouped", "cap and sinks", "slopes", "window"]


@pytest.mark.parametrize("style", FORMS)
def test_found_and_equal(style: str) -> None:
    """One node, two KV heads, and the module's own logits at other lengths."""
    model = written_out(style)
    program = PassManager(capture_passes()).run(capture(model))
    (site,) = attention_sites(program)
    assert site.node.target is (ATTENTION if style in ("cap and sinks", "slopes") else SDPA)
    assert site.keys.meta["val"].shape[1] == 2
    assert site.scale == pytest.approx({"matmul": 1.0, "window": 1.0}.get(style, 0.3), abs=1e-7)
    assert site.softcap == (5.0 if style == "cap and sinks" else None)
    assert str(site.mask) == ("window 16" if style == "window" else "causal")
    assert "softmax" not in graph_text(program)
    for tokens in (1, 41):
        ids = torch.randint(3, 60, (3, tokens))
        positions = torch.arange(tokens).repeat(3, 1)
        with torch.no_grad():
            found = program.graph_module(ids, positions)[0]
            torch.testing.assert_close(found, model(ids, positions), atol=1e-5, rtol=1e-5)


def test_sinks_and_slopes_are_the_models_own() -> None:
    program = PassManager(capture_passes()).run(capture(written_out("cap and sinks", "slopes", "slopes")))
    sinks, *slopes = attention_sites(program)
    assert sinks.sinks is not None
    assert sinks.sinks.target == "layers.0.sinks"
    assert [str(site.slopes and site.slopes.target) for site in slopes] == ["layers.1.slopes", "layers.2.slopes"]


@pytest.mark.parametrize(
    ("style", "reason"),
    [
        ("content", "its mask or bias depends on the tokens"),
        ("squared", "its scores are neither proportional to the products nor capped by tanh"),
        ("noisy", "it does not compute softmax attention"),
        ("wrong way", "it does not compute softmax attention|neither proportional|is over"),
        ("pooling", ""),
    ],
)
def test_look_alikes_are_refused_with_a_reason(style: str, reason: str) -> None:
    """The attention of the other layer is found, that one is left in the graph and mixes tokens."""
    with pytest.raises(UnsupportedModelError, match=rf"the logits: .* of a token .*{reason}"):
        kvpass.capture_model(written_out("matmul", style))


def test_a_layer_that_is_no_attention_alone() -> None:
    with pytest.raises(UnsupportedModelError, match=r"no attention found.*its mask or bias depends on the tokens"):
        kvpass.capture_model(written_out("content"))


def test_is_idempotent() -> None:
    program = PassManager((DropNoops(), MatchAttention())).run(capture(written_out("matmul", "slopes")))
    before = graph_text(program)
    assert MatchAttention().run(program) == 0
    assert graph_text(program) == before


class Mixing(PlainLM):
    """Attention as plain as it gets, and something over tokens or layers besides."""

    def __init__(self, how: str) -> None:
        super().__init__("causal", "causal")
        self.how, self.conv = how, nn.Conv1d(32, 32, 20, groups=32)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        angles = position_ids[:, :, None].float() * torch.cat([self.inv_freq, self.inv_freq])
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1], angles.cos()[:, None], angles.sin()[:, None]))
            match self.how:
                case "convolution":
                    states[-1] = states[-1] + self.conv(F.pad(states[-1].transpose(1, 2), (19, 0))).transpose(1, 2)
                case "far":
                    states[-1] = states[-1] + states[-1].roll(16, dims=1)
                case "softmax":
                    states[-1] = states[-1] + states[-1].softmax(dim=1)
        if self.how == "layers":  # [B, S, layers, D]: each token looks at its own states
            stacked = torch.stack(states, dim=2)
            states.append(F.scaled_dot_product_attention(stacked, stacked, stacked).mean(2))
        return self.head(states[-1])


@pytest.mark.parametrize("how", ["convolution", "far", "softmax"])
def test_what_mixes_tokens_besides_is_refused(how: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"layer 1.* of a token "):
        kvpass.capture_model(Mixing(how))


def test_attention_over_layers_is_no_layer() -> None:
    """It needs no cache, and stays in the graph."""
    model = Mixing("layers")
    compiled = kvpass.compile(model, backend="eager")
    ids = torch.randint(3, 60, (2, 30))
    with torch.no_grad():
        expected = model(ids, torch.arange(30).repeat(2, 1))
    out = compiled.prefill(ids[:, :28])
    assert len(out.past_key_values) == 2
    for i in (28, 29):
        logits = compiled(input_ids=ids[:, i : i + 1], past_key_values=out.past_key_values).logits
        torch.testing.assert_close(logits[:, 0], expected[:, i], atol=1e-5, rtol=1e-5)
