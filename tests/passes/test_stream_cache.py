"""Attention of a single token as products and sums."""

import pytest
import torch
from models import captured_model

from kvpass.ir.form import Phase
from kvpass.pass_manager import PassManager
from kvpass.passes.stream_cache import StreamCache, attention
from kvpass.pipeline import phase_passes
from kvpass.testing import assert_pass_diff


def test_one_layer() -> None:
    steps = phase_passes(Phase.DECODE, None, one_row=True)
    program = PassManager(steps[: [step.name for step in steps].index("stream-cache")]).run(
        captured_model("llama").graphs.located
    )
    assert_pass_diff(
        program,
        StreamCache(),
        """\

-scaled_dot_product_attention: f32[1, 2, 2, 16] = scaled_dot_product_attention(flatten(unflatten(add_1, 1, [2, 2]), 2, 3), keys_out_0, values_out_0, flatten(expand(unsqueeze(unsqueeze(le, 1), 2), [-1, -1, 2, -1, -1]), 2, 3), scale=0.25)
-attended_0: f32[1, 4, 1, 16] = flatten(unflatten(scaled_dot_product_attention, 2, [2, 1]), 1, 2)
+as_strided: f32[1, 2, 2, 16] = as_strided(mul(flatten(unflatten(add_1, 1, [2, 2]), 2, 3), 0.25), [1, 2, 2, 16], [64, 32, 16, 1])
+stack: f32[1, 2, 2, C_0] = stack([sum(mul(keys_out_0, slice(as_strided, 2, 0, 1)), [-1]), sum(mul(keys_out_0, slice(as_strided, 2, 1, 2)), [-1])], 2)
+where: f32[1, 2, 2, C_0] = where(flatten(expand(unsqueeze(unsqueeze(le, 1), 2), [-1, -1, 2, -1, -1]), 2, 3), stack, -inf)
+unsqueeze_20: f32[1, 2, 2, C_0, 1] = unsqueeze(exp(sub(where, amax(where, [-1], True))), -1)
+getitem: f32[1, 2, C_0, 16] = split(values_out_0, 16, -1)[0]
+stack_1: f32[1, 2, 2, 16] = stack([cat([sum(mul(select(unsqueeze_20, 2, 0), getitem), [-2])], -1), cat([sum(mul(select(unsqueeze_20, 2, 1), getitem), [-2])], -1)], -2)
+streamed_attention_0: f32[1, 2, 2, 16] = div(stack_1, sum(unsqueeze_20, [3]))
+attended_0: f32[1, 4, 1, 16] = flatten(unflatten(streamed_attention_0, 2, [2, 1]), 1, 2)
""",
        layer=0,
    )
    assert StreamCache().run(PassManager((StreamCache(),)).run(program)) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "channels"), [(1, 64), (3, 64), (8, 128), (2, 24)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("slots", [37, 128, 200])
def test_the_same_attention(rows: int, channels: int, masked: bool, slots: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows)
    query, key, value = (torch.randn(1, 2, n, channels, generator=generator).to(dtype) for n in (rows, slots, slots))
    mask = (
        (torch.rand(1, 1, rows, slots, generator=generator) < 0.5).index_fill(3, torch.tensor([0]), True)
        if masked
        else None
    )
    given = (query, key, value) if mask is None else (query, key, value, mask)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3)
    tolerance = 1e-5 if dtype is torch.float32 else 1e-2
    torch.testing.assert_close(attention(0.3)(*given), expected, atol=tolerance, rtol=tolerance)


def test_what_stays() -> None:
    """Several rows, and more queries than a product reads pairs for."""
    program = PassManager(phase_passes(Phase.DECODE, None)).run(captured_model("llama").graphs.located)
    assert StreamCache().run(program) == 0
