"""A second process finds the graphs that a first one made, and nothing that is not the same."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import token_ids
from tiny_models import tiny_model
from torch.fx import Graph

import kvpass
import kvpass.api
from kvpass import graph_store
from kvpass.graph_store import ENVIRONMENT, name_of, store_of
from kvpass.ir.files import NotStorableError, _expression, program_from_json, program_to_json
from kvpass.ir.form import Phase
from kvpass.ir.printer import graph_text
from kvpass.ir.program import KVProgram
from kvpass.ir.verifier import verify
from kvpass.pass_manager import PassManager
from kvpass.pipeline import phase_passes
from kvpass.presses import Knorm, SnapKV


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path))
    return tmp_path


@pytest.fixture
def no_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on neither export nor a pass may run."""

    def fail(*arguments: object, **options: object) -> Any:
        raise AssertionError("this was stored")

    monkeypatch.setattr(kvpass.api, "capture", fail)
    monkeypatch.setattr(PassManager, "run", fail)


def tensors_of(program: KVProgram) -> dict[str, torch.Tensor]:
    return {str(node.target): program.attribute(node) for node in program.graph.nodes if node.op == "get_attr"}


def test_a_program_survives_a_file(arch: str) -> None:
    """Text, sizes, ports; and the passes go on from it as from the one that was written."""
    located = kvpass.capture_model(tiny_model(arch)).graphs.located
    again = program_from_json(json.loads(json.dumps(program_to_json(located))), tensors_of(located))
    assert graph_text(again) == graph_text(located)
    for phase in Phase:
        steps = phase_passes(phase, SnapKV(window_size=8), one_row=phase is Phase.DECODE)
        made, from_file = (PassManager(steps).run(program) for program in (located, again))
        assert graph_text(from_file) == graph_text(made)
        reread = program_from_json(json.loads(json.dumps(program_to_json(made))), tensors_of(made))
        assert graph_text(reread) == graph_text(made)
        assert (reread.inputs, reread.outputs, reread.history) == (made.inputs, made.outputs, made.history)
        verify(reread, recompute=True)


def talk(model: kvpass.CompiledModel) -> list[Any]:
    out = model.generate(token_ids(2, 50), max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    answer = model(input_ids=token_ids(2, 7), past_key_values=out.past_key_values)
    return [out.sequences, answer.logits, str(model.report()), model.print_graph("extend")]


def test_nothing_is_done_twice(request: pytest.FixtureRequest) -> None:
    first = talk(kvpass.compile(tiny_model("gemma3_text"), "snapkv", ratio=0.5, backend="eager"))
    request.getfixturevalue("no_capture")
    model = tiny_model("gemma3_text")
    compiled = kvpass.compile(model, "snapkv", ratio=0.5, backend="eager")
    second = talk(compiled)
    for found, expected in zip(second, first, strict=True):
        if isinstance(found, torch.Tensor):
            torch.testing.assert_close(found, expected)
        else:
            assert found == expected
    own = {parameter.data_ptr() for parameter in model.parameters()}
    assert {parameter.data_ptr() for parameter in compiled.weights.parameters()} <= own


def test_a_table_that_the_model_does_not_have_is_stored(request: pytest.FixtureRequest) -> None:
    """Dynamic RoPE is fixed for the longest text while the model is captured."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def made() -> Any:
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}
        rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
        config = LlamaConfig(vocab_size=256, max_position_embeddings=64, rope_parameters=rope, **sizes)
        return LlamaForCausalLM(config).eval()

    first = talk(kvpass.compile(made(), "knorm", ratio=0.5, backend="eager", max_tokens=200))
    request.getfixturevalue("no_capture")
    second = talk(kvpass.compile(made(), "knorm", ratio=0.5, backend="eager", max_tokens=200))
    torch.testing.assert_close(first[1], second[1])


def test_what_may_differ_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def key(model: object, *facts: object) -> Path:
        store = store_of(model, *facts)
        assert store is not None
        return store.folder

    model = tiny_model("llama")
    same = key(model, None)
    assert key(tiny_model("llama"), None) == same
    assert key(model, 100) != same
    assert key(tiny_model("qwen2"), None) != same
    model.config.rms_norm_eps *= 2
    assert key(model, None) != same
    other = tiny_model("llama")
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    assert key(other, None) != same
    monkeypatch.setattr(graph_store, "_sources", lambda: "edited")
    assert key(tiny_model("llama"), None) != same


def test_presses_are_told_apart() -> None:
    names = [name_of(phase_passes(Phase.PREFILL, press)) for press in (None, Knorm(), SnapKV(), SnapKV(window_size=8))]
    assert None not in names
    assert len(set(names)) == 4

    class Mine(Knorm):
        """Its code may change under the same name."""

    assert name_of(phase_passes(Phase.PREFILL, Mine())) is None


def test_code_that_is_not_torchs_or_transformers_is_not_stored(folder: Path) -> None:
    class Own(torch.nn.Linear):
        def forward(self, states: torch.Tensor) -> torch.Tensor:
            return super().forward(states) * 2

    def hooked() -> Any:
        model = tiny_model("llama")
        model.model.norm.register_forward_hook(lambda module, given, left: left * 2)
        return model

    def replaced() -> Any:
        model = tiny_model("llama")
        model.model.layers[0].mlp.up_proj = Own(64, 128, bias=False)
        return model

    def patched() -> Any:
        model = tiny_model("llama")
        model.model.norm.forward = lambda states: states
        return model

    assert store_of(tiny_model("llama")) is not None
    assert [store_of(make()) for make in (hooked, replaced, patched)] == [None] * 3
    assert not list(folder.iterdir())


def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ((ENVIRONMENT, "0"), ("KVPASS_VERIFY", "full"), ("KVPASS_DUMP_DIR", "somewhere")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert store_of(tiny_model("llama")) is None


@pytest.mark.parametrize("damage", ["", "{}", '{"own": [], "records": [], "program": {"sizes": {}, "nodes": 3}}'])
def test_a_damaged_file_is_written_again(folder: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    expected = kvpass.capture_model(tiny_model("llama"))
    (file,) = folder.glob("*/located.json")
    whole = file.read_text()
    file.write_text(damage)
    found = kvpass.capture_model(tiny_model("llama"))
    assert "is damaged" in caplog.text
    assert graph_text(found.graphs.located) == graph_text(expected.graphs.located)
    assert len(file.read_text()) == pytest.approx(len(whole), rel=0.01)


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path / "file"))
    assert kvpass.compile(tiny_model("llama"), "knorm", ratio=0.5, backend="eager").prefill(token_ids(1, 50))


def test_sizes_are_read_and_not_run() -> None:
    import ast

    with pytest.raises(NotStorableError, match="a size is"):
        _expression(ast.parse("__import__('os').getcwd()", mode="eval").body, lambda name: name)


def test_loops_have_no_form_in_a_file() -> None:
    located = kvpass.capture_model(tiny_model("llama")).graphs.located.copy()
    graph: Graph = located.graph
    with graph.inserting_before(graph.output_node()):
        graph.call_function(torch.ops.higher_order.while_loop, ())
    with pytest.raises(NotStorableError, match="while_loop"):
        program_to_json(located)
