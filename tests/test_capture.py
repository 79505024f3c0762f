"""Capture leaves the model as it was, and says why it cannot."""

import copy

import pytest
import torch
from models import eager_model, token_ids
from modules import PlainLM
from tiny_models import tiny_model
from torch import Tensor, nn
from torch.export import ExportedProgram

import kvpass
from kvpass.capture import capture, export
from kvpass.capture.export import export_model
from kvpass.capture.functional_form import DECOMPOSITIONS, functional
from kvpass.capture.transformers_model import attending_with
from kvpass.errors import UnsupportedModelError
from kvpass.ir.printer import graph_text
from kvpass.pass_manager import PassManager
from kvpass.pipeline import capture_passes


def test_the_attention_implementation_comes_back_after_an_exception() -> None:
    model = eager_model("llama")
    before = model.config._attn_implementation
    with pytest.raises(RuntimeError, match="in the middle"), attending_with(model, "eager"):
        raise RuntimeError("in the middle")
    assert model.config._attn_implementation == before


def test_capture_does_not_change_the_model(arch: str) -> None:
    """Weights, buffers, config, mode and answers are the same bits before and after."""
    model = tiny_model(arch, seed=3).train()
    state, config = copy.deepcopy(model.state_dict()), copy.deepcopy(model.config.to_dict())
    ids = token_ids(2, 33)
    expected = model.eval()(ids).logits
    model.train()
    capture(model)
    assert model.training
    assert model.config.to_dict() == config
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model.eval()(ids).logits, expected)


@pytest.mark.parametrize("arch", ["llama", "phi3", "gemma3_text"])
def test_functions_need_no_second_trace(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of casts, reshapes, dropouts and chunks the graph is the one that torch's decompositions make."""

    def located() -> str:
        return graph_text(PassManager(capture_passes()).run(capture(eager_model(arch))))

    monkeypatch.setattr(export, "functional", lambda exported: exported.run_decompositions(DECOMPOSITIONS))
    decomposed = located()
    monkeypatch.setattr(export, "functional", functional)
    monkeypatch.setattr(ExportedProgram, "run_decompositions", None)  # fails if it is called
    assert located() == decomposed


def test_writing_needs_a_second_trace() -> None:
    """A model that adds in place: its graph holds no operator that writes, and says the same."""

    class Adds(PlainLM):
        def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
            logits = super().forward(input_ids, position_ids)
            logits[..., 0] += 1
            return logits.view_as(logits).add_(2)

    model, ids = Adds("causal", "causal"), token_ids(2, 20) % 60
    schemas = [getattr(node.target, "_schema", None) for node in capture(model).graph.nodes]
    assert not any(schema.is_mutable for schema in schemas if schema is not None)
    expected = model(ids, torch.arange(20).repeat(2, 1))[:, -1:]
    torch.testing.assert_close(kvpass.compile(model, backend="eager").prefill(ids).logits, expected)


def test_parameters_are_shared_not_copied() -> None:
    model = tiny_model("llama")
    held = {id(p) for p in capture(model).graph_module.parameters()}
    assert held <= {id(p) for p in model.parameters()}


def test_a_plain_module_runs_from_prefill_to_decode() -> None:
    """A module that transformers does not know: compressed prefill equals its own logits, decode equals one shot."""
    model = PlainLM("causal", "repeated", "mask")
    ids = token_ids(2, 40) % 60
    whole = model(ids, torch.arange(40).repeat(2, 1))
    pressed = kvpass.compile(model, press="snapkv", target_size=7, backend="eager", capacity=64)
    assert pressed.prefill(ids).past_key_values.kept(1) == 40  # too short for a window of 64: kept whole
    pressed = kvpass.compile(model, press="expected_attention", target_size=7, backend="eager")
    out = pressed.prefill(ids[:, :30])
    torch.testing.assert_close(out.logits[:, 0], whole[:, 29], atol=1e-5, rtol=1e-5)
    assert [out.past_key_values.kept(layer) for layer in range(3)] == [7, 7, 7]
    dense = kvpass.compile(model, backend="eager")
    out = dense.prefill(ids[:, :30])
    steps = [dense(input_ids=ids[:, i : i + 1], past_key_values=out.past_key_values).logits for i in range(30, 40)]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole[:, 30:], atol=1e-5, rtol=1e-5)


class InASet(nn.Module):
    """Loops over a set, as models of transformers do over the kinds of their layers."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.weights = nn.ParameterDict({name: nn.Parameter(torch.ones(1)) for name in names})

    def forward(self, ids: Tensor) -> Tensor:
        total = ids[..., None].float()
        for name in set(self.weights):
            total = total * self.weights[name]
        return total


def test_the_order_of_a_set_is_no_matter_of_the_process() -> None:
    names = [f"kind_{letter}" for letter in "hgfedcba"]
    exported = export_model(InASet(names), {}, 100)
    order = [node.args[1].name for node in exported.graph.nodes if node.target is torch.ops.aten.mul.Tensor]
    assert order == [f"p_model_weights_{name}" for name in sorted(names)]
    assert "set" not in globals()


def test_a_plain_module_generates() -> None:
    model = kvpass.compile(PlainLM("causal", "causal"), press="knorm", ratio=0.5, backend="eager")
    ids = token_ids(1, 20) % 60
    out = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert out.shape == (1, 26)


def test_what_no_attention_node_expresses_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Named with its layer."""
    model = tiny_model("llama")
    attention = type(model.model.layers[0].self_attn)
    plain = attention.forward
    monkeypatch.setattr(attention, "forward", lambda self, *args, **options: plain(self, *args, indices=[1], **options))
    with pytest.raises(UnsupportedModelError, match=r"layer 0.*'indices', an indexer .* no attention node expresses"):
        capture(model)
