"""Masks and repeated heads are recognised by what they compute."""

import pytest
import torch
from models import eager_model
from modules import PlainLM

from kvpass.capture import capture
from kvpass.errors import UnsupportedModelError
from kvpass.ir.attention_site import SDPA
from kvpass.ir.masks import Causal, Sliding
from kvpass.ir.printer import graph_text
from kvpass.ir.program import KVProgram
from kvpass.ir.subgraph import argument
from kvpass.pass_manager import PassManager
from kvpass.passes.drop_noops import DropNoops
from kvpass.passes.normalize_attention import NormalizeAttention
from kvpass.pipeline import capture_passes


def normalized(model: torch.nn.Module) -> KVProgram:
    return PassManager((DropNoops(), NormalizeAttention())).run(capture(model))


def run(program: KVProgram, tokens: int) -> torch.Tensor:
    ids = torch.randint(3, 60, (3, tokens), generator=torch.Generator().manual_seed(tokens))
    with torch.no_grad():
        return program.graph_module(ids, torch.arange(tokens).repeat(3, 1))[0]


@pytest.mark.parametrize(
    ("style", "window", "heads"),
    [
        ("causal", None, 2),
        ("repeated", None, 2),
        ("tiled", None, 4),
        ("mask", None, 2),
        ("float_mask", None, 2),
        ("window", 16, 2),
    ],
)
def test_finds_window_and_kv_heads(style: str, window: int | None, heads: int) -> None:
    """Whatever the code looks like, the node says causal or windowed, and keys have as many heads as are distinct."""
    program = normalized(PlainLM(style))
    (node,) = [n for n in program.graph.nodes if n.target is SDPA]
    assert node.meta["mask"] == (Causal() if window is None else Sliding(window))
    assert argument(node, "is_causal") is (window is None)
    assert argument(node, "key").meta["val"].shape[1] == heads
    assert argument(node, "value").meta["val"].shape[1] == heads


@pytest.mark.parametrize("style", ["causal", "repeated", "tiled", "mask", "float_mask", "window"])
@pytest.mark.parametrize("tokens", [5, 77])
def test_computes_the_same(style: str, tokens: int) -> None:
    """The normal form gives the module's own logits, at lengths that are not the example's."""
    model = PlainLM(style)
    ids = torch.randint(3, 60, (3, tokens), generator=torch.Generator().manual_seed(tokens))
    expected = model(ids, torch.arange(tokens).repeat(3, 1))
    torch.testing.assert_close(run(normalized(model), tokens), expected, atol=1e-5, rtol=1e-5)


def test_window_that_never_bites_in_a_short_text_is_found() -> None:
    """A window of 1,000 looks causal at every short length; its number stands in the mask's computation."""
    program = normalized(PlainLM("window", window=1000))
    (node,) = [n for n in program.graph.nodes if n.target is SDPA]
    assert node.meta["mask"] == Sliding(1000)


@pytest.mark.parametrize(
    ("style", "reason"),
    [("dilated", "neither causal nor a sliding window"), ("bidirectional", "tokens see the future")],
)
def test_look_alikes_are_refused_with_a_reason(style: str, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"layer 1.*{reason}"):
        normalized(PlainLM("causal", style))


def test_both_roads_of_capture_give_one_form(arch: str) -> None:
    """Captured through the attention registry or as plain sdpa: the located graph is the same text.

    In one process: Gemma 3 makes its two rotations in the order of a set, which is another one in each process.
    """
    plain, registered = (
        PassManager(capture_passes()).run(capture(eager_model(arch), registry=registry)) for registry in (False, True)
    )
    assert graph_text(plain) == graph_text(registered)


def test_is_idempotent() -> None:
    program = normalized(PlainLM("repeated", "window"))
    before = graph_text(program)
    NormalizeAttention().run(program)
    assert graph_text(program) == before
