"""The manager verifies, times, prints and dumps; a broken graph names the rule, the node and the pass."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from models import captured_model

from kvpass.errors import PressError, VerificationError
from kvpass.ir.builder import GraphBuilder
from kvpass.ir.form import Form, Phase
from kvpass.ir.program import KVProgram, Role
from kvpass.pass_manager import Pass, PassManager
from kvpass.passes.splice_evict import SpliceEvict
from kvpass.pipeline import capture_passes, phase_passes
from kvpass.press import ScorerPress
from kvpass.press_inputs import PressInputs


@dataclass(frozen=True)
class Break(Pass):
    """A pass that does something forbidden."""

    name: ClassVar[str] = "break"
    requires: ClassVar[Form] = Form.LOCATED
    produces: ClassVar[Form] = Form.LOWERED

    how: Callable[[KVProgram], object]

    def run(self, program: KVProgram) -> int:
        self.how(program)
        return 1


def located() -> KVProgram:
    return captured_model("llama").graphs.located


def drop_value(program: KVProgram) -> None:
    del next(n for n in program.graph.nodes if n.target is torch.ops.aten.linear.default).meta["val"]


def wrong_value(program: KVProgram) -> None:
    node = next(n for n in program.graph.nodes if n.target is torch.ops.aten.linear.default)
    node.meta["val"] = node.meta["val"].to(torch.float64)


def forget_site(program: KVProgram) -> None:
    next(n for n in program.graph.nodes if "site" in n.meta).meta.pop("site")


def undeclared_input(program: KVProgram) -> None:
    with program.graph.inserting_before(next(iter(program.graph.nodes))):
        program.graph.placeholder("stranger").meta["val"] = torch.empty(1)


def forget_update(program: KVProgram) -> None:
    program.drop_output(next(port for port in program.outputs if port.role is Role.KEYS))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (drop_value, r"node linear has no fake value; create nodes with GraphBuilder"),
        (wrong_value, r"node linear claims .*float64.* computes"),
        (forget_site, r"expected one attention in each of 2 layers, found \[1\]"),
        (undeclared_input, r"inputs \['stranger', 'input_ids', 'position_ids'\] are not the declared"),
    ],
)
def test_broken_graphs_are_found(
    how: Callable[[KVProgram], object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One broken graph for each rule; the message names the pass that ran last."""
    monkeypatch.setenv("KVPASS_VERIFY", "full")

    @dataclass(frozen=True)
    class BreakLocated(Break):
        produces: ClassVar[Form] = Form.LOCATED

    with pytest.raises(VerificationError, match=rf"after 'break'.*{message}"):
        PassManager([BreakLocated(how)]).run(located())


def test_a_frozen_size_is_found() -> None:
    """A pass that asks for a size as a number ties the symbol to the example's."""

    @dataclass(frozen=True)
    class Freeze(Break):
        requires: ClassVar[Form] = Form.SPECIALIZED
        produces: ClassVar[Form] = Form.SPECIALIZED

    steps = (phase_passes(Phase.EXTEND, None)[0], Freeze(lambda program: int(program.shapes["S"])))
    with pytest.raises(VerificationError, match=r"after 'break'.*symbolic sizes became constant: \{'S': '\d+'\}"):
        PassManager(steps).run(located())


def test_a_frozen_size_is_found_when_a_press_is_traced() -> None:
    """int() of a size would be right for the example only; the error says so and names the press."""

    @dataclass(frozen=True)
    class Frozen(ScorerPress):
        name: ClassVar[str] = "frozen"

        def score(self, x: PressInputs) -> torch.Tensor:
            half = int(x.keys.shape[2]) // 2
            return x.keys.sum(-1) * half

    with pytest.raises(PressError, match=r"splice-press.*freezes the size \{'S': '\d+'\}.*torch.sym_int"):
        PassManager(phase_passes(Phase.PREFILL, Frozen())).run(located())


def test_a_score_of_the_wrong_shape_is_refused() -> None:
    @dataclass(frozen=True)
    class Narrow(ScorerPress):
        name: ClassVar[str] = "narrow"

        def score(self, x: PressInputs) -> torch.Tensor:
            return x.keys.sum(-1)[:, :1]

    with pytest.raises(PressError, match=r"narrow: layer 0: score\(\) returned \(B, 1, S\), expected .* \(B, 2, S\)"):
        PassManager(phase_passes(Phase.PREFILL, Narrow())).run(located())


def test_a_cache_input_without_update_is_found() -> None:
    @dataclass(frozen=True)
    class Forget(Break):
        requires: ClassVar[Form] = Form.CACHED
        produces: ClassVar[Form] = Form.CACHED

    steps = (*phase_passes(Phase.DECODE, None)[:2], Forget(forget_update))
    with pytest.raises(VerificationError, match=r"cache inputs .* and updates .* differ"):
        PassManager(steps).run(located())


def test_a_wrong_order_is_refused_before_the_pass_runs() -> None:
    with pytest.raises(VerificationError, match="pass 'splice-evict' takes PRESSED to COMPRESSED, found LOCATED"):
        PassManager([SpliceEvict()]).run(located())


def test_a_failing_pass_names_its_predecessors() -> None:
    def fail(program: KVProgram) -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError) as caught:
        PassManager([Break(fail)]).run(located())
    before = ", ".join(step.name for step in capture_passes())
    assert f"in pass 'break', after {before}" in caught.value.__notes__[0]


def test_the_program_given_is_not_changed() -> None:
    before = [node.format_node() for node in located().graph.nodes]
    PassManager(phase_passes(Phase.DECODE, None)).run(located())
    assert [node.format_node() for node in located().graph.nodes] == before


def test_dump_and_print(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """KVPASS_DUMP_DIR writes one numbered file a pass, KVPASS_PRINT_IR logs the passes named, print_ir= calls."""
    monkeypatch.setenv("KVPASS_DUMP_DIR", str(tmp_path))
    monkeypatch.setenv("KVPASS_PRINT_IR", "insert-kv-cache")
    PassManager(phase_passes(Phase.DECODE, None)).run(located())
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "000_specialize-phase_decode.txt",
        "001_insert-kv-cache_decode.txt",
        "002_write-cache-in-place_decode.txt",
    ]
    assert "attended_0" in (tmp_path / "001_insert-kv-cache_decode.txt").read_text()
    assert [record.message.split(":")[0] for record in caplog.records if record.levelname == "WARNING"] == [
        "after insert-kv-cache (decode)"
    ]
    seen: list[str] = []
    PassManager(phase_passes(Phase.DECODE, None), print_ir=lambda name, text: seen.append(name)).run(located())
    assert seen == ["specialize-phase", "insert-kv-cache", "write-cache-in-place"]


def test_nodes_say_where_they_come_from() -> None:
    """Every node that a pass added has a value, the pass's name and, inside a layer, its module stack."""
    program = PassManager(phase_passes(Phase.DECODE, None)).run(located())
    added = [node for node in program.graph.nodes if "kvpass" in node.meta and node.op == "call_function"]
    assert {node.meta["kvpass"].made_by for node in added} == {"insert-kv-cache"}
    layered = [node for node in added if node.meta["kvpass"].layer == 1]
    assert layered
    assert all("layers.1.self_attn" in str(node.meta["nn_module_stack"]) for node in layered)


def test_inline_puts_nodes_behind_their_inputs_and_shares_what_no_layer_owns() -> None:
    program = located().copy()
    builder = GraphBuilder(program, "test")
    linears = [n for n in program.graph.nodes if n.target is torch.ops.aten.linear.default]

    def shifted(x: torch.Tensor) -> torch.Tensor:
        return x + torch.arange(x.shape[1])[:, None]

    (first,) = builder.inline(shifted, [linears[0]], names=["shifted"], layer=0)
    (second,) = builder.inline(shifted, [linears[7]], names=["shifted"], layer=1)
    assert (first.name, second.name) == ("shifted_0", "shifted_1")
    assert linears[0] < first < linears[1]
    assert first.args[1] is second.args[1]
