"""The graph diffs that people read in a review: the passes that make a captured program a located one."""

from bare_modules import CONTEXT, BareLM
from models import captured_model, eager_model
from modules import PlainLM

from kvpass.capture import capture
from kvpass.ir.printer import graph_text
from kvpass.pass_manager import PassManager
from kvpass.passes.drop_noops import DropNoops
from kvpass.passes.find_positions import FindPositions
from kvpass.passes.locate_attention import LocateAttention
from kvpass.passes.normalize_attention import NormalizeAttention
from kvpass.passes.prove_token_local import ProveTokenLocal
from kvpass.testing import assert_pass_diff


def test_drop_noops() -> None:
    """Casts to the dtype that is there, views that would depend on strides, sizes read off any tensor."""
    assert_pass_diff(
        capture(eager_model("llama")),
        DropNoops(),
        """\

-_assert_tensor_metadata_6: ? = _assert_tensor_metadata(embedding, dtype=f32)
-_to_copy_6: f32[B, S, 64] = _to_copy(embedding, dtype=f32)
-pow_1: f32[B, S, 64] = pow(_to_copy_6, 2)
+pow_1: f32[B, S, 64] = pow(embedding, 2)
-mul_3: f32[B, S, 64] = mul(_to_copy_6, rsqrt)
-_assert_tensor_metadata_7: ? = _assert_tensor_metadata(mul_3, dtype=f32)
-mul_4: f32[B, S, 64] = mul(model.layers.0.input_layernorm.weight, _to_copy(mul_3, dtype=f32))
+mul_3: f32[B, S, 64] = mul(embedding, rsqrt)
+mul_4: f32[B, S, 64] = mul(model.layers.0.input_layernorm.weight, mul_3)
-transpose: f32[B, 4, S, 16] = transpose(view(linear, [B, S, -1, 16]), 1, 2)
+transpose: f32[B, 4, S, 16] = transpose(reshape(linear, [B, S, -1, 16]), 1, 2)
-transpose_1: f32[B, 2, S, 16] = transpose(view(linear_1, [B, S, -1, 16]), 1, 2)
+transpose_1: f32[B, 2, S, 16] = transpose(reshape(linear_1, [B, S, -1, 16]), 1, 2)
-unsqueeze_13: f32[B, 1, S, 16] = unsqueeze(_to_copy_4, 1)
-unsqueeze_14: f32[B, 1, S, 16] = unsqueeze(_to_copy_5, 1)
+unsqueeze_13: f32[B, 1, S, 16] = unsqueeze(cos, 1)
+unsqueeze_14: f32[B, 1, S, 16] = unsqueeze(sin, 1)
-scaled_dot_product_attention: f32[B, 4, S, 16] = scaled_dot_product_attention(add_3, add_4, transpose(view(linear_2, [B, S, -1, 16]), 1, 2), expand_1, scale=0.25, enable_gqa=True)
+scaled_dot_product_attention: f32[B, 4, S, 16] = scaled_dot_product_attention(add_3, add_4, transpose(reshape(linear_2, [B, S, -1, 16]), 1, 2), __and___1, scale=0.25, enable_gqa=True)
-add_5: f32[B, S, 64] = add(_to_copy_6, linear_3)
-_assert_tensor_metadata_8: ? = _assert_tensor_metadata(add_5, dtype=f32)
-_to_copy_8: f32[B, S, 64] = _to_copy(add_5, dtype=f32)
-pow_2: f32[B, S, 64] = pow(_to_copy_8, 2)
+add_5: f32[B, S, 64] = add(embedding, linear_3)
+pow_2: f32[B, S, 64] = pow(add_5, 2)
-mul_9: f32[B, S, 64] = mul(_to_copy_8, rsqrt_1)
-_assert_tensor_metadata_9: ? = _assert_tensor_metadata(mul_9, dtype=f32)
-mul_10: f32[B, S, 64] = mul(model.layers.0.post_attention_layernorm.weight, _to_copy(mul_9, dtype=f32))
+mul_9: f32[B, S, 64] = mul(add_5, rsqrt_1)
+mul_10: f32[B, S, 64] = mul(model.layers.0.post_attention_layernorm.weight, mul_9)
-add_7: f32[B, S, 64] = add(_to_copy_8, linear_6)
+add_7: f32[B, S, 64] = add(add_5, linear_6)
""",
    )


def test_find_positions() -> None:
    """An embedding of 0..S-1, and a table cut to the length."""
    before = PassManager((DropNoops(),)).run(capture(BareLM("table", "buffer", layers=1), max_tokens=CONTEXT))
    assert_pass_diff(
        before,
        FindPositions(),
        """\

+lookup: f32[S, 4, 2] = index_select(table, 0, select(position_ids, 0, 0))
-slice_1: f32[S, 4, 2] = slice(table, 0, None, S)
""",
        layer=None,
    )
    before = PassManager((DropNoops(),)).run(capture(BareLM("learned", layers=1), max_tokens=CONTEXT))
    assert_pass_diff(
        before,
        FindPositions(),
        """\

+positions: i64[S] = to(select(position_ids, 0, 0), i64)
-arange: i64[S] = arange(S)
-embedding_1: f32[S, 32] = embedding(places.weight, arange)
+embedding_1: f32[S, 32] = embedding(places.weight, positions)
""",
        layer=None,
    )


def test_prove_token_local_changes_nothing() -> None:
    located = captured_model("llama").graphs.located
    assert graph_text(PassManager((ProveTokenLocal(),)).run(located)) == graph_text(located)


def test_normalize_attention_finds_a_window_and_the_kv_heads() -> None:
    """A mask that turns out to be a window of 16, and heads that were repeated for the queries."""
    window = PassManager((DropNoops(),)).run(capture(PlainLM("window")))
    assert_pass_diff(
        window,
        NormalizeAttention(),
        """\

-mul_1: f32[B, 4, S, 8] = mul(transpose, unsqueeze_1)
+mul_1: f32[B, 4, S, 8] = mul(transpose, unsqueeze_2)
-mul_2: f32[B, 4, S, 8] = mul(cat_1, unsqueeze_2)
+mul_2: f32[B, 4, S, 8] = mul(cat_1, unsqueeze_3)
-mul_3: f32[B, 2, S, 8] = mul(transpose_1, unsqueeze_1)
+mul_3: f32[B, 2, S, 8] = mul(transpose_1, unsqueeze_2)
-mul_4: f32[B, 2, S, 8] = mul(cat_2, unsqueeze_2)
+mul_4: f32[B, 2, S, 8] = mul(cat_2, unsqueeze_3)
-arange: i64[S] = arange(S)
-le: bool[S, S] = le(arange, unsqueeze(arange, 1))
-sub: i64[S, 1] = sub(unsqueeze(arange, 1), 16)
-gt: bool[S, S] = gt(arange, sub)
-__and__: bool[S, S] = __and__(le, gt)
-scaled_dot_product_attention: f32[B, 4, S, 8] = scaled_dot_product_attention(add, add_1, transpose(reshape(linear_2, [B, S, 2, 8]), 1, 2), __and__, enable_gqa=True)
+scaled_dot_product_attention: f32[B, 4, S, 8] = scaled_dot_product_attention(add, add_1, transpose(reshape(linear_2, [B, S, 2, 8]), 1, 2), __and__, 0, False, scale=None, enable_gqa=True)
""",
    )
    repeated = PassManager((DropNoops(),)).run(capture(PlainLM("repeated")))
    assert_pass_diff(
        repeated,
        NormalizeAttention(),
        """\

-repeat_interleave: f32[B, 4, S, 8] = repeat_interleave(add_1, 2, 1)
-repeat_interleave_1: f32[B, 4, S, 8] = repeat_interleave(transpose(reshape(linear_2, [B, S, 2, 8]), 1, 2), 2, 1)
-scaled_dot_product_attention: f32[B, 4, S, 8] = scaled_dot_product_attention(add, repeat_interleave, repeat_interleave_1, None, 0, True)
+scaled_dot_product_attention: f32[B, 4, S, 8] = scaled_dot_product_attention(add, add_1, transpose(reshape(linear_2, [B, S, 2, 8]), 1, 2), None, 0, True, scale=None, enable_gqa=True)
""",
    )


def test_locate_attention_names_the_node() -> None:
    normal = PassManager((DropNoops(), NormalizeAttention())).run(capture(PlainLM("causal")))
    assert_pass_diff(
        normal,
        LocateAttention(),
        """\

-scaled_dot_product_attention: f32[B, 4, S, 8] = scaled_dot_product_attention(add, add_1, transpose(reshape(linear_2, [B, S, 2, 8]), 1, 2), None, 0, True, scale=None, enable_gqa=True)
-linear_3: f32[B, S, 32] = linear(reshape(transpose(scaled_dot_product_attention, 1, 2), [B, S, 32]), layers.0.o_proj.weight)
+attention_0: f32[B, 4, S, 8] = scaled_dot_product_attention(add, add_1, transpose(reshape(linear_2, [B, S, 2, 8]), 1, 2), None, 0, True, scale=None, enable_gqa=True)
+linear_3: f32[B, S, 32] = linear(reshape(transpose(attention_0, 1, 2), [B, S, 32]), layers.0.o_proj.weight)
""",
    )
