"""What each press writes into one layer: a text file a press, rewritten with EXPECTTEST_ACCEPT=1."""

import os
from pathlib import Path

import pytest
from catalogue import press_by_name
from models import captured_model
from torch.fx import Node

import kvpass
from kvpass.ir.attention_site import attention_sites
from kvpass.ir.program import KVProgram

FOLDER = Path(__file__).parent / "snapshots"
OURS = sorted(name for name, cls in kvpass.registered_presses().items() if cls.__module__.startswith("kvpass."))


@pytest.mark.parametrize("name", OURS)
def test_one_layer_of_each_press(name: str) -> None:
    """The second layer; what stands outside of the layers follows. No press projects anything a second time."""
    captured = captured_model("llama")
    located = captured.graphs.located
    press = press_by_name(name, located.layer_count)
    model = kvpass.compile(captured, press, 0.5 if press.needs_budget else None, backend="eager")
    layer, outside = (model.graph_diff(layer=n, only="splice-press") for n in (1, None))
    text = f"{layer}\noutside the layers:\n{outside}"
    path = FOLDER / f"{name}.txt"
    if os.environ.get("EXPECTTEST_ACCEPT"):
        FOLDER.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()


def test_there_is_a_snapshot_for_each_press_and_no_other() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.txt")) == OURS


@pytest.mark.parametrize("name", OURS)
def test_nothing_is_projected_twice(name: str) -> None:
    """Queries, keys and hidden states are taps: a press adds no product with a weight of the model.

    criticalkv reads the output weight, which no tap can stand for: one product per query head.
    """
    captured = captured_model("llama")
    press = press_by_name(name, captured.graphs.located.layer_count)
    model = kvpass.compile(captured, press, 0.5 if press.needs_budget else None, backend="eager")
    sites = len(attention_sites(captured.graphs.located))
    assert _products_with_weights(model.graph("prefill")) == _products_with_weights(captured.graphs.located) + (
        4 * sites if name == "criticalkv" else 0
    )


def _products_with_weights(program: KVProgram) -> int:
    """Products with a parameter of the model itself, seen through transposes and slices of it."""
    names = ("linear", "matmul", "mm", "bmm", "addmm")
    products = [node for node in program.graph.nodes if getattr(node.target, "__name__", "").split(".")[0] in names]
    return sum(any(_is_weight(source) for source in node.all_input_nodes) for node in products)


def _is_weight(node: Node) -> bool:
    while node.op == "call_function" and len(node.all_input_nodes) == 1:
        (node,) = node.all_input_nodes
    return node.op == "get_attr" and str(node.target).endswith("weight") and not str(node.target).startswith("press_")


def test_a_loop_does_not_depend_on_what_was_traced_before() -> None:
    captured = captured_model("llama")
    texts = []
    for size in (16, 7, 16):
        model = kvpass.compile(captured, kvpass.presses.Block(kvpass.presses.KeyDiff(), size), 0.5, backend="eager")
        texts.append(model.graph_diff(layer=1, only="splice-press"))
    assert texts[0] == texts[2]
    assert texts[0].replace("16*", "7*").replace("//16", "//7") == texts[1]
