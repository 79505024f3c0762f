"""What TensorRT is given, on a machine without a GPU: it takes every node, computes eager's numbers, and is built."""

import pytest
import torch
from deployment.tensorrt_cases import TARGETS, check_prompt, distinct_ids, needs_tensorrt, prefills, step, with_room
from models import compiled_model
from presses.catalogue import press_by_name
from tiny_models import tiny_model

import kvpass
from kvpass.backends.tensorrt.conversion import lower
from kvpass.backends.tensorrt.engines import network_of
from kvpass.deployment.export import _manifest, prefill_program, prompts_of, step_program
from kvpass.deployment.manifest import phase_spec
from kvpass.errors import PackageError, PressError
from kvpass.ir.form import Phase
from kvpass.pass_manager import PassManager
from kvpass.passes.lower_for_tensorrt import LowerForTensorRT
from kvpass.pipeline import phase_passes

pytestmark = needs_tensorrt

LENGTHS = (53, 149)  # neither is an example's
BUDGETED = (
    "knorm",
    "snapkv(window_size=8)",
    "expected_attention(n_future_positions=16)",
    "streaming_llm",
    "tova",
    "keydiff",
    "chunkkv(snapkv(window_size=4), chunk_length=7)",
    "key_rerotation(knorm)",
)


def check_steps(arch: str, model: kvpass.CompiledModel, prompt: int, state: dict[str, torch.Tensor]) -> None:
    """Five tokens and then two single ones behind a prompt."""
    cache = model.prefill(distinct_ids(prompt)).past_key_values
    state = with_room(model, state, step(arch, Phase.DECODE), 40)
    for new in (torch.tensor([[7, 8, 9, 10, 11]]), torch.tensor([[5]]), torch.tensor([[6]])):
        phase = step(arch, Phase.EXTEND if new.shape[1] > 1 else Phase.DECODE)
        found = phase.run({"input_ids": new, **state})
        expected = model(input_ids=new, past_key_values=cache)
        torch.testing.assert_close(found.pop("logits"), expected.logits, atol=2e-5, rtol=1e-4)
        state = found


@pytest.mark.parametrize("press", BUDGETED)
def test_prompts(press: str) -> None:
    """Prefill of each press, at lengths that were never traced."""
    model = compiled_model("llama", press, ratio=0.5)
    phases = prefills(model)
    for tokens in LENGTHS:
        check_prompt(model, phases, tokens)


@pytest.mark.parametrize(("arch", "press"), [("llama", "knorm"), ("qwen3", "snapkv(window_size=8)")])
def test_texts(arch: str, press: str) -> None:
    """What follows a prompt reads and writes the caches that it left."""
    model = compiled_model(arch, press, ratio=0.5)
    phases = prefills(model)
    for tokens in LENGTHS:
        check_steps(arch, model, tokens, check_prompt(model, phases, tokens))


def test_windows() -> None:
    """Layers of a window hold rings, which the builder takes, too."""
    model = compiled_model("gemma3_text", "snapkv(window_size=8)", ratio=0.5)
    phases = prefills(model)
    for tokens in LENGTHS:
        check_steps("gemma3_text", model, tokens, check_prompt(model, phases, tokens))
    for phase in (*phases, step("gemma3_text", Phase.EXTEND), step("gemma3_text", Phase.DECODE)):
        assert phase.network.build(("SM89",))


def test_without_a_press() -> None:
    model = compiled_model("llama")
    check_steps("llama", model, 53, check_prompt(model, prefills(model), 53))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_engines_are_built(dtype: torch.dtype) -> None:
    """All phases, for three generations of GPUs, each for itself and in one engine."""
    model = kvpass.compile(tiny_model("llama", dtype=dtype), "snapkv(window_size=8)", ratio=0.5, backend="eager")
    recipe = model._recipe
    (prompts,) = prompts_of(recipe.press, recipe.budget, 2, 200)
    programs = {
        ("prefill", tuple(prompts.ranges)): prefill_program(model, "tensorrt", prompts, 1, 200),
        ("extend", ((2, 200),)): step_program(model, "tensorrt", Phase.EXTEND, 1, 200),
        ("decode", ((1, 1),)): step_program(model, "tensorrt", Phase.DECODE, 1, 200),
    }
    for (phase, tokens), program in programs.items():
        spec = phase_spec(phase, phase, tokens, program)
        network = network_of(program, spec, _manifest(model, "tensorrt", "host", 1, [spec]), {})
        names = [network.definition.get_output(i).name for i in range(network.definition.num_outputs)]
        assert names[0] == "logits" and len({*names, *network.profile}) == len(names) + len(network.profile)
        assert network.build(TARGETS)
        if phase == "prefill":
            assert all(network.build((target,)) for target in TARGETS)


def test_a_program_that_writes_is_refused() -> None:
    """By the pass, and by whoever lowers another program."""
    model = compiled_model("llama")
    with pytest.raises(kvpass.errors.VerificationError, match="writes to keys_0, which TensorRT would drop"):
        PassManager((*phase_passes(Phase.DECODE, None), LowerForTensorRT(200))).run(model._located)
    with pytest.raises(PackageError, match="writes to lengths"):
        lower(step_program(model, "aot_inductor", Phase.EXTEND, 1, 200))


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("leverage", "Cholesky factor"),
        ("compactor", "Cholesky factor"),
        ("cap", "solution of linear equations"),
        ("observed_attention", "loop"),
        ("merging", "loop"),
        ("block", "loop"),
    ],
)
def test_a_press_without_a_form_is_refused(name: str, what: str) -> None:
    model = compiled_model("llama", press_by_name(name, 2), ratio=0.5)
    recipe = model._recipe
    (prompts,) = prompts_of(recipe.press, recipe.budget, 2, 200)
    with pytest.raises(PressError, match=rf"{name}.*: layer 0: TensorRT has no {what}"):
        prefill_program(model, "tensorrt", prompts, 1, 200)
