"""What only the last token's logits need is computed for it alone; they, the caches and what is kept stay the same."""

from collections.abc import Callable

import pytest
import torch
from attention_forms import unusual_model
from models import captured_model, token_ids
from modules import PlainLM
from test_shared_keys import Sharing
from tiny_models import tiny_model
from torch import Tensor, nn

import kvpass
from kvpass.capture import capture
from kvpass.ir.form import Phase
from kvpass.ir.printer import graph_diff
from kvpass.ir.program import KVProgram, Role, layer_of
from kvpass.ir.subgraph import argument
from kvpass.pass_manager import PassManager
from kvpass.passes.narrow_to_last_token import NarrowToLastToken
from kvpass.passes.prove_token_local import ProveTokenLocal
from kvpass.pipeline import capture_passes, phase_passes
from kvpass.presses import ExpectedAttention, Knorm, ObservedAttention, SnapKV

BATCH, TOKENS, KEPT, WINDOW = 2, 41, 13, 16
PRESSES: dict[str, kvpass.Press | None] = {
    "none": None,
    "knorm": Knorm(),
    "snapkv": SnapKV(window_size=8),
    "expected_attention": ExpectedAttention(n_future_positions=32),
    "observed_attention": ObservedAttention(block=16),
}


def lowered(located: KVProgram, press: kvpass.Press | None = None) -> tuple[KVProgram, KVProgram]:
    """The prefill graph in front of the pass, and behind it."""
    passes = phase_passes(Phase.PREFILL, press)
    index = [step.name for step in passes].index(NarrowToLastToken.name)
    before = PassManager(passes[:index]).run(located)
    return before, PassManager(passes[index : index + 1]).run(before)


def run(program: KVProgram) -> dict[str, Tensor]:
    """All that the graph returns, and what it wrote to its caches."""
    inputs = {}
    for port, node in zip(program.inputs, program.placeholders(), strict=True):
        value = node.meta["val"]
        match port.role:
            case Role.INPUT_IDS:
                inputs[port.name] = token_ids(BATCH, TOKENS) % 60
            case Role.POSITION_IDS:
                inputs[port.name] = torch.arange(TOKENS).repeat(BATCH, 1)
            case Role.SIZE:
                inputs[port.name] = torch.zeros(KEPT)
            case _:
                slots = WINDOW if program.shapes.text(value.shape[2]).startswith("W_") else TOKENS + 3
                shape = (BATCH, value.shape[1], slots, *value.shape[3:])
                inputs[port.name] = torch.zeros(shape, dtype=value.dtype)
    with torch.no_grad():
        outputs = program.graph_module(*inputs.values())
    return {**inputs, **dict(zip((port.name for port in program.outputs), outputs, strict=True))}


def assert_same(before: KVProgram, after: KVProgram) -> None:
    """Bit for bit, but for the logits: a product of one row is summed in another order."""
    expected, found = run(before), run(after)
    logits = expected.pop("logits")[:, -1:]
    torch.testing.assert_close(found.pop("logits"), logits, atol=1e-5, rtol=1e-5)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def queries(program: KVProgram) -> list[str]:
    """How many queries the attention of each layer has."""
    nodes = [node for node in program.graph.nodes if "site" in node.meta]
    return [program.shapes.text(argument(node, "query").meta["val"].shape[2]) for node in nodes]


def full_projections(program: KVProgram, layer: int) -> list[str]:
    """The weights of a layer that all tokens are multiplied by."""
    linears = [n for n in program.graph.nodes if n.target is torch.ops.aten.linear.default and layer_of(n) == layer]
    return [n.args[1].target.split(".")[-2] for n in linears if program.shapes.text(n.meta["val"].shape[1]) == "S"]


@pytest.mark.parametrize("press", ["none", "snapkv", "expected_attention"])
def test_every_architecture(arch: str, press: str) -> None:
    before, after = lowered(captured_model(arch).graphs.located, PRESSES[press])
    assert_same(before, after)
    last = before.layer_count - 1
    assert queries(before) == ["S"] * (last + 1)
    assert queries(after) == ["S"] * last + ["1"]
    stay = {"qkv_proj"} if arch == "phi3" else {"k_proj", "v_proj"} | ({"q_proj"} if PRESSES[press] else set())
    assert set(full_projections(after, last)) == stay
    assert len(full_projections(before, last)) == (4 if arch == "phi3" else 7)
    for layer in range(last):
        assert graph_diff(before, after, layer) == "\n"


@pytest.mark.parametrize("press", ["knorm", "observed_attention"])
def test_presses_read_what_they_did(press: str) -> None:
    """Attention weights of all tokens need all queries; keys alone need none."""
    before, after = lowered(captured_model("llama").graphs.located, PRESSES[press])
    assert_same(before, after)
    assert queries(after) == ["S", "1"]
    assert ("q_proj" in full_projections(after, 1)) == (press == "observed_attention")


@pytest.mark.parametrize("last", ["sliding_attention", "full_attention"])
def test_windows(last: str) -> None:
    """The mask of the last layer has one row, that of the layer before it all."""
    kinds = ["sliding_attention", last]
    model = tiny_model("gemma3_text", num_hidden_layers=2, layer_types=kinds)
    before, after = lowered(kvpass.capture_model(model).graphs.located, PRESSES["knorm"] if last[0] == "f" else None)
    assert_same(before, after)
    masks = [argument(node, "attn_mask") for node in after.graph.nodes if "site" in node.meta]
    rows = [mask and after.shapes.text(mask.meta["val"].shape[-2]) for mask in masks]
    assert rows == ["S", "1" if last == "sliding_attention" else None]


def test_layers_behind_the_last_keys() -> None:
    """Those of layer 1 are read by the layers behind it: of layer 1 and all of them nothing else is needed in full."""
    located = kvpass.capture_model(Sharing(), max_tokens=512).graphs.located
    for press in (None, Knorm()):
        before, after = lowered(located, press)
        assert_same(before, after)
        assert queries(after) == ["S", "1", "1", "1", "1"]


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "gpt2", "bloom", "falcon_alibi", "diffllama"])
def test_forms_of_attention(name: str) -> None:
    """Soft-caps, sinks, distances; projections of [B * S, D]; only experts read all tokens together."""
    before, after = lowered(kvpass.capture_model(unusual_model(name)).graphs.located)
    assert_same(before, after)
    assert queries(after) == ["S", "S" if name == "gpt_oss" else "1"]


def sort_by_expert(x: Tensor) -> Tensor:
    """As mixtures of experts do: tokens of an expert together, each back to its place."""
    tokens = x.reshape(-1, x.shape[-1])
    order = tokens[:, :2].argmax(-1).argsort(stable=True)
    return torch.zeros_like(tokens).index_copy(0, order, tokens[order].tanh()).reshape(x.shape)


def transpose_rows(x: Tensor) -> Tensor:
    """The rows of a token lie together: every B-th entry is of one row."""
    return x.transpose(0, 1).reshape(-1, x.shape[2]).tanh().reshape(x.shape[1], x.shape[0], x.shape[2]).transpose(0, 1)


def half_of_a_chunk(x: Tensor) -> Tensor:
    one, other = x.chunk(2, dim=-1)
    return torch.cat([one.cumsum(1), other.tanh()], dim=-1)


def rank_of_a_token(x: Tensor) -> Tensor:
    return x[..., None].sort(dim=1).values[..., 0]


BEHIND: dict[str, tuple[bool, Callable[[Tensor], Tensor]]] = {  # whether the attention in front of it is narrowed
    "rows behind each other": (True, lambda x: x.reshape(-1, 32).tanh().reshape(x.shape)),
    "three axes": (True, lambda x: x.permute(2, 0, 1)[:, None].softmax(0).sum(1).permute(1, 2, 0)),
    "parts": (True, lambda x: torch.stack([*x.unflatten(-1, (4, 8)).unbind(2)[::-1]], dim=2).flatten(2)),
    "mean of rows": (True, lambda x: x + x.mean(dim=0, keepdim=True)),
    "products": (False, lambda x: (x @ x.transpose(1, 2)).softmax(-1) @ x),
    "products of columns": (False, lambda x: x + (x.transpose(1, 2) @ x).softmax(1).sum(1, keepdim=True)),
    "sum": (False, lambda x: x + x.cumsum(1)),
    "sum over rows": (False, lambda x: x.reshape(-1, 32).cumsum(0).reshape(x.shape)),
    "softmax": (False, lambda x: x.softmax(1)),
    "mean": (False, lambda x: x.mean(1, keepdim=True).expand_as(x)),
    "shift": (False, lambda x: torch.cat([x[:, -1:], x[:, :-1]], dim=1)),
    "flip": (False, lambda x: x.flip(1)),
    "two for one": (False, lambda x: x.reshape(x.shape[0], -1, 16).cumsum(1).reshape(x.shape)),
    "experts": (False, sort_by_expert),
    "tokens in front": (False, transpose_rows),
    "half of a chunk": (False, half_of_a_chunk),
    "rank": (False, rank_of_a_token),
}


class Behind(PlainLM):
    """Does something with the states between the attention and the logits."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__("causal")
        self.layers.append(Changing(change))


class Changing(nn.Module):
    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return self.change(x)


@pytest.mark.parametrize("behind", BEHIND)
def test_what_mixes_tokens_is_given_all_of_them(behind: str) -> None:
    """Also what no model could be compiled with: `prove-token-local` is left out."""
    narrowed, change = BEHIND[behind]
    steps = [step for step in capture_passes() if not isinstance(step, ProveTokenLocal)]
    before, after = lowered(PassManager(steps).run(capture(Behind(change))))
    assert_same(before, after)
    assert queries(after) == ["1" if narrowed else "S"]
    assert after.output_value(Role.LOGITS).meta["val"].shape[1] == 1
