"""Every press on TensorRT: as a network that computes eager's numbers and is built, or refused with a reason."""

import os
from pathlib import Path

import pytest
import torch
from deployment.onnx_cases import needs_onnx, parsed
from deployment.tensorrt_cases import (
    LONGEST,
    OURS,
    REFUSED,
    TARGETS,
    check_prompt,
    check_steps,
    converted,
    distinct_ids,
    every_press_in,
    long_prefill,
    model_with,
    needs_tensorrt,
    one_layer,
    prefills,
)

from kvpass.errors import KVPassError
from kvpass.ir.form import Phase
from kvpass.pass_manager import PassManager
from kvpass.passes.lower_for_tensorrt import LowerForTensorRT
from kvpass.pipeline import phase_passes
from kvpass.prompts import prompts_of

README = Path(__file__).parents[2] / "README.md"
LENGTHS = (53, 149)  # neither is an example's


@needs_tensorrt
@every_press_in(torch.float32)
def test_it_computes_the_same_and_is_built(name: str, arch: str, dtype: torch.dtype) -> None:
    model, phase = model_with(name, arch), converted(name, arch, dtype)
    for tokens in LENGTHS:
        check_steps(one_layer(arch), model, tokens, check_prompt(model, [phase], tokens))
    assert phase.network.build(TARGETS)


@needs_tensorrt
@needs_onnx
@every_press_in(torch.float32)
def test_onnx_computes_the_same_and_is_built(name: str, arch: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """The same program through ONNX: as ONNX Runtime runs it, and as TensorRT's own parser reads it."""
    model, (prompts, program) = model_with(name, arch), long_prefill(name, arch, dtype)
    phase = parsed("prefill", prompts.ranges, program, tmp_path)
    for tokens in LENGTHS:
        found = check_prompt(model, [phase], tokens)
        for output, value in phase.evaluate({"input_ids": distinct_ids(tokens)}).items():
            torch.testing.assert_close(value, found[output], atol=2e-5, rtol=1e-4, msg=output)
    assert phase.build(TARGETS)


@needs_tensorrt
@pytest.mark.parametrize(("name", "lengths"), [("chunk", (10, 28, 53)), ("chunkkv", (6,)), ("lagkv", (10,))])
def test_short_prompts(name: str, lengths: tuple[int, ...]) -> None:
    """Presses with other graphs for short prompts."""
    model = model_with(name)
    phases = prefills(model)
    for tokens in lengths:
        check_prompt(model, phases, tokens)
    assert all(phase.network.build(TARGETS) for phase in phases)


def refusal(name: str) -> str:
    """Why a press is refused; "" if it is not. Nothing of TensorRT is needed to say so."""
    model = model_with(name)
    try:
        for prompts in prompts_of(model._recipe.press, model._recipe.budget, 1, LONGEST):
            assert prompts.press is not None
            lower = LowerForTensorRT(LONGEST, prompts.greatest(1), name)
            PassManager(phase_passes(Phase.PREFILL, prompts.press, functional=True, tensorrt=lower)).run(model._located)
    except KVPassError as error:
        return str(error)
    return ""


def test_table_of_presses() -> None:
    """That of the README; EXPECTTEST_ACCEPT=1 rewrites it. Which presses are not refused is tested above."""
    lines = ["| press | TensorRT |", "|---|---|"]
    for name in OURS:
        reason = refusal(name) if name in REFUSED else ""
        assert bool(reason) == (name in REFUSED)
        lines.append(f"| `{name}` | {'refused: ' + short(reason) if reason else 'yes'} |")
    text = README.read_text()
    start = text.index("<!-- tensorrt -->\n") + len("<!-- tensorrt -->\n")
    end = text.index("<!-- end -->", start)
    table = "\n".join(lines)
    if os.environ.get("EXPECTTEST_ACCEPT"):
        README.write_text(f"{text[:start]}{table}\n{text[end:]}")
    else:
        assert text[start:end].strip() == table


def short(reason: str) -> str:
    """Without the layer, the node and the cure."""
    return reason.split(": ")[-1].split(" (")[0].split(", which no")[0]
