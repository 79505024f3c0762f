"""`backend="tensorrt"`: kvpass runs engines as any other graph. Here their networks are evaluated on the CPU."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from deployment.packages import PRESSES, expected
from deployment.tensorrt_cases import distinct_ids, needs_tensorrt
from models import captured_model, compiled_model, token_ids
from torch import Tensor

import kvpass
from kvpass.backends.tensorrt import graph
from kvpass.backends.tensorrt.conversion import Network
from kvpass.backends.tensorrt.evaluation import evaluate
from kvpass.deployment.manifest import PhaseSpec
from kvpass.errors import InputError, PackageError

pytestmark = needs_tensorrt

PROFILE = {"prefill": (2, 64, 300), "extend": (2, 8, 60), "slots": (2, 100, 700)}
NEW = 12


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Networks are evaluated in the place of engines; of which phase and for how many rows they were made."""
    made: list[tuple[str, int]] = []

    def evaluated(network: Network, spec: PhaseSpec) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
        made.append((spec.phase, int(spec.inputs[0].shape[0])))

        def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            for name, extent in network.profile.items():
                shape = tuple(inputs[name].shape)
                assert all(a <= n <= b for a, n, b in zip(extent.least, shape, extent.most, strict=True)), (name, shape)
            found = evaluate(network.definition, inputs)
            return dict(zip((port.name for port in spec.outputs), found, strict=True))

        return run

    monkeypatch.setattr(graph, "check_device", lambda device: None)
    monkeypatch.setattr(graph, "runnable", evaluated)
    return made


def compiled(arch: str, press: str | None, **options: Any) -> kvpass.CompiledModel:
    options = {"ratio": 0.5 if press else None, "profile": PROFILE, **options}
    model = kvpass.compile(captured_model(arch), press, backend="tensorrt", **options)
    model.generation_config.eos_token_id = 255
    return model


@pytest.mark.parametrize("press", PRESSES)
def test_greedy_text(press: str, built: list[tuple[str, int]]) -> None:
    """Three lengths that no graph was made with, and one that is too short for some presses."""
    model = compiled("llama", press)
    for tokens in (5, 41, 118, 250):
        found = model.generate(token_ids(1, tokens), max_new_tokens=NEW, do_sample=False)
        assert torch.equal(found, expected("llama", press, tokens)), tokens
    assert len(set(built)) == len(built)  # nothing is built twice


def test_rows_of_different_length(built: list[tuple[str, int]]) -> None:
    """Prompts go one by one, steps together; positions come from outside."""
    ids, mask = token_ids(2, 60), torch.ones(2, 60, dtype=torch.int64)
    mask[0, :17] = 0
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": NEW, "do_sample": False}
    model, eager = compiled("llama", "knorm"), compiled_model("llama", "knorm", ratio=0.5)
    eager.generation_config.eos_token_id = 255
    assert torch.equal(model.generate(ids, **options), eager.generate(ids, **options))
    assert not {(phase, rows) for phase, rows in built} - {("prefill", 1), ("decode", 2)}


def test_windows_questions_and_another_budget(built: list[tuple[str, int]]) -> None:
    """Rings come back whole, a question is appended, and a budget that changes makes another engine."""
    press = "snapkv(window_size=8)"
    model, eager = compiled("gemma3_text", press), compiled_model("gemma3_text", press, ratio=0.5)
    for ratio in (0.5, 0.25):
        model.set_budget(ratio=ratio)
        eager.set_budget(ratio=ratio)
        found, cache = model.prefill(distinct_ids(149)), eager.prefill(distinct_ids(149)).past_key_values
        assert torch.equal(found.past_key_values.lengths, cache.lengths)
        for new in (torch.tensor([[7, 8, 9, 10, 11]]), torch.tensor([[5]])):
            logits = model(input_ids=new, past_key_values=found.past_key_values).logits
            torch.testing.assert_close(logits, eager(input_ids=new, past_key_values=cache).logits, atol=2e-5, rtol=1e-4)
        for layer in range(len(cache)):
            assert torch.equal(found.past_key_values.positions(layer), cache.positions(layer))
    assert [phase for phase, _ in built].count("prefill") == 2


def test_embeddings(built: list[tuple[str, int]]) -> None:
    """A prompt of embeddings instead of ids."""
    embedded = compiled_model("llama").weights.get_parameter("model.embed_tokens.weight")[token_ids(1, 41)]
    options: dict[str, Any] = {"inputs_embeds": embedded, "max_new_tokens": NEW, "do_sample": False}
    model, eager = compiled("llama", "knorm"), compiled_model("llama", "knorm", ratio=0.5)
    assert torch.equal(model.generate(**options), eager.generate(**options))
    assert ("prefill", 1) in built


def test_what_is_refused(built: list[tuple[str, int]]) -> None:
    """A press without a form, prompts that no engine serves, sizes that are none."""
    with pytest.raises(kvpass.errors.PressError, match="TensorRT has no Cholesky factor"):
        compiled("llama", "leverage")
    with pytest.raises(InputError, match="which does not ascend"):
        compiled("llama", "knorm", profile={"slots": (2, 9, 8)})
    with pytest.raises(InputError, match="it may say prefill, extend, slots"):
        compiled("llama", "knorm", profile={"decode": (1, 1, 1)})
    with pytest.raises(InputError, match="this graph is for 2 to 4096 tokens"):
        compiled("llama", None, profile={"prefill": (1, 1, 1)})
    with pytest.raises(InputError, match=r"profile=.* is for backend='tensorrt'"):
        compiled_model("llama", "knorm", ratio=0.5, profile=PROFILE)


def test_without_a_gpu() -> None:
    """The error says where engines can be built."""
    with pytest.raises(PackageError, match=r"runs engines on a CUDA device, the model is on cpu; .*export\(path"):
        kvpass.compile(captured_model("llama"), "knorm", 0.5, backend="tensorrt")
