"""What equal layers have in common is traced for one of them, whatever their caches' sizes are called."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from tiny_models import tiny_model
from torch.utils import _pytree as pytree

import kvpass
from kvpass.ir import builder
from kvpass.ir.form import Phase
from kvpass.ir.program import KVProgram, Role, layer_of
from kvpass.ir.symbols import symbols_in
from kvpass.ir.verifier import verify
from kvpass.pass_manager import PassManager
from kvpass.pipeline import phase_passes
from kvpass.registry import parse_press

ONCE = {
    Phase.PREFILL: ("SplicePress._splice.<locals>.compress", "store_prefix", "overwrite_prefix"),
    Phase.DECODE: ("attention.<locals>.attended",),
}


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each function was traced."""
    calls: Counter[str] = Counter()

    def counted(function: Callable[..., Any], **options: Any) -> Any:
        calls[function.__qualname__] += 1
        return make_fx(function, **options)

    make_fx = builder.make_fx
    monkeypatch.setattr(builder, "make_fx", counted)
    return calls


def made(phase: Phase, layers: int) -> KVProgram:
    located = kvpass.capture_model(tiny_model("llama", num_hidden_layers=layers)).graphs.located
    press = parse_press("snapkv(window_size=4)") if phase is Phase.PREFILL else None
    return PassManager(phase_passes(phase, press, one_row=phase is Phase.DECODE)).run(located)


@pytest.mark.parametrize("phase", ONCE)
def test_four_layers_are_traced_as_often_as_one(phase: Phase, traced: Counter[str]) -> None:
    program = made(phase, 4)
    found = {name: traced[name] for name in ONCE[phase]}
    traced.clear()
    made(phase, 1)
    assert found == {name: traced[name] for name in ONCE[phase]}
    assert all(count in (1, 2) for count in found.values()), found  # 2: in two passes
    verify(program, recompute=True)  # shapes, strides and types are those of each layer's own sizes


def test_a_layer_has_its_own_sizes() -> None:
    """No node of a layer has a size of another one's cache."""
    program = made(Phase.DECODE, 2)
    capacities = [set(symbols_in(program.input_node(Role.KEYS, layer).meta["val"])) for layer in range(2)]
    for layer, other in ((0, 1), (1, 0)):
        nodes = [node for node in program.graph.nodes if node.op == "call_function" and layer_of(node) == layer]
        values = (value for node in nodes for value in pytree.tree_leaves(node.meta["val"]))
        found = {symbol for value in values for symbol in symbols_in(value)}
        assert capacities[layer] <= found and not capacities[other] & found
