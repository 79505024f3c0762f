"""Projections of a single token as products and sums."""

import pytest
import torch
from models import captured_model, token_ids
from tiny_models import tiny_model

import kvpass
from kvpass.backends import streams_memory
from kvpass.ir.form import Phase
from kvpass.ir.program import KVProgram
from kvpass.pass_manager import PassManager
from kvpass.passes.stream_weights import StreamWeights
from kvpass.pipeline import phase_passes
from kvpass.testing import assert_pass_diff


def before(captured: kvpass.CapturedModel) -> KVProgram:
    steps = phase_passes(Phase.DECODE, None, one_row=True)
    assert isinstance(steps[-1], StreamWeights)
    return PassManager(steps[:-1]).run(captured.graphs.located)


def test_the_head() -> None:
    program = before(captured_model("llama"))
    assert_pass_diff(
        program,
        StreamWeights(),
        """\

-linear_14: f32[1, 1, 256] = linear(mul_20, lm_head.weight)
-output logits: linear_14
+row: f32[1, 64] = as_strided(reshape(mul_20, [1, -1]), [1, 64], [64, 1])
+streamed: f32[256] = sum(mul(lm_head.weight, row), [1])
+projected: f32[1, 1, 256] = reshape(streamed, [1, 1, -1])
+output logits: projected
""",
        layer=None,
    )
    after = PassManager((StreamWeights(),)).run(program)
    assert StreamWeights().run(after) == 0
    assert not [node for node in after.graph.nodes if node.target is torch.ops.aten.linear.default]


@pytest.mark.parametrize(("arch", "dtype"), [("qwen2", torch.float32), ("llama", torch.bfloat16)])
def test_the_same_logits(arch: str, dtype: torch.dtype) -> None:
    """With biases (Qwen 2); in bfloat16 as exact as the matrix product, which sums in float32 too."""
    program = before(kvpass.capture_model(tiny_model(arch, dtype=dtype)))
    after = PassManager((StreamWeights(),)).run(program)
    inputs = [token_ids(1, 1), torch.zeros(1, 1, dtype=torch.int64), torch.zeros(2, 1, dtype=torch.int64)]
    for port in program.inputs[3:]:
        shape = next(n for n in program.placeholders() if n.target == port.name).meta["val"].shape
        inputs.append(torch.zeros(1, shape[1], 9, shape[3], dtype=dtype))
    with torch.no_grad():
        expected, found = (p.graph_module(*(t.clone() for t in inputs))[0] for p in (program, after))
    tolerance = 1e-5 if dtype is torch.float32 else 5e-2
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
    assert found.dtype == dtype


def test_where_it_is_worth_it() -> None:
    assert streams_memory("inductor", torch.device("cpu"))
    assert not streams_memory("eager", torch.device("cpu"))
    assert not streams_memory("inductor", torch.device("cuda"))
    assert not streams_memory(lambda module, inputs: module, torch.device("cpu"))
