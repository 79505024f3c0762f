"""What holds for every pass: a second run changes nothing, and the results of the graph stay what they were."""

import functools

import pytest
import torch
from models import captured_model
from torch import Tensor

from kvpass.ir.form import Phase
from kvpass.ir.printer import graph_text
from kvpass.ir.program import KVProgram, Role
from kvpass.pass_manager import Pass, PassManager
from kvpass.pipeline import phase_passes
from kvpass.presses import ExpectedAttention

WINDOW = 16  # of the tiny Gemma 3
PREFILL = phase_passes(Phase.PREFILL, ExpectedAttention(n_future_positions=32))


def steps(phase: Phase) -> tuple[Pass, ...]:
    return PREFILL if phase is Phase.PREFILL else phase_passes(phase, None)


STEPS = [(phase, index) for phase in Phase for index in range(len(steps(phase)))]


@functools.cache
def after(arch: str, phase: Phase, count: int) -> KVProgram:
    """What the first passes of a phase leave; shared, do not change it."""
    if count == 0:
        return captured_model(arch).graphs.located
    return PassManager(steps(phase)[count - 1 : count]).run(after(arch, phase, count - 1))


def logits(program: KVProgram, tokens: int) -> Tensor:
    """Run the graph on random tokens over an empty cache."""
    ids = torch.randint(3, 250, (3, tokens), generator=torch.Generator().manual_seed(7))
    inputs = []
    for port, node in zip(program.inputs, program.placeholders(), strict=True):
        shape = [size if isinstance(size, int) else 3 for size in node.meta["val"].shape]
        match port.role:
            case Role.INPUT_IDS:
                inputs.append(ids)
            case Role.POSITION_IDS:
                inputs.append(torch.arange(tokens).repeat(3, 1))
            case Role.LENGTHS:
                inputs.append(torch.zeros(shape, dtype=torch.int64))
            case Role.SIZE:
                inputs.append(torch.empty(5))
            case Role.NEW_TOKENS:
                inputs.append(torch.full((3,), tokens))
            case _:
                ring = program.shapes.text(node.meta["val"].shape[2]).startswith("W_")
                inputs.append(torch.zeros(3, shape[1], WINDOW if ring else tokens + 9, shape[3]))
    with torch.no_grad():
        return program.graph_module(*inputs)[0]


@pytest.mark.parametrize(("phase", "index"), STEPS, ids=lambda v: v.value if isinstance(v, Phase) else str(v))
def test_second_run_changes_nothing(phase: Phase, index: int) -> None:
    """The graph of a phase is cut once; every other pass finds nothing left to do."""
    once = after("llama", phase, index + 1).copy()
    step = steps(phase)[index]
    before = graph_text(once)
    assert step.run(once) == (1 if step.name == "specialize-phase" else 0)
    assert graph_text(once) == before


@pytest.mark.parametrize(("phase", "index"), STEPS, ids=lambda v: v.value if isinstance(v, Phase) else str(v))
def test_logits_stay_what_they_were(phase: Phase, index: int) -> None:
    """No pass changes what prefill, extend or decode computes over an empty cache; gemma3 has windows as well."""
    for tokens in (1,) if phase is Phase.DECODE else (41, 66):
        expected = logits(after("gemma3_text", phase, 1), tokens)[:, -1:]
        found = logits(after("gemma3_text", phase, index + 1), tokens)[:, -1:]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
