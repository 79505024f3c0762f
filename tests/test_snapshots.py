"""The graph diffs that people read in a review: one layer, the passes of each phase and each press."""

import pytest
from expecttest import assert_expected_inline
from models import captured_model, compiled_model
from modules import PlainLM

import kvpass
from kvpass.capture import capture
from kvpass.ir.form import Phase
from kvpass.ir.printer import graph_text
from kvpass.pass_manager import PassManager
from kvpass.passes.narrow_to_last_token import NarrowToLastToken
from kvpass.passes.specialize_phase import SpecializePhase
from kvpass.pipeline import capture_passes, phase_passes
from kvpass.presses import ExpectedAttention, Knorm, SnapKV
from kvpass.testing import assert_graph_diff, assert_pass_diff


def pressed(press: kvpass.Press) -> kvpass.CompiledModel:
    return compiled_model("llama", press, ratio=0.5)


def test_specialize_phase() -> None:
    """A decode graph has one token; what a size was becomes a number."""
    located = PassManager(capture_passes()).run(capture(PlainLM("window")))
    assert_pass_diff(
        located,
        SpecializePhase(Phase.DECODE),
        """\

-input input_ids: i64[B, S]
-input position_ids: i64[B, S]
-arange: i64[S] = arange(S)
-unsqueeze: i64[S, 1] = unsqueeze(arange, 1)
-__and__: bool[S, S] = __and__(le(arange, unsqueeze), gt(arange, sub(unsqueeze, 16)))
-embedding: f32[B, S, 32] = embedding(embed.weight, input_ids)
+input input_ids: i64[B, 1]
+input position_ids: i64[B, 1]
+arange: i64[1] = arange(1)
+unsqueeze: i64[1, 1] = unsqueeze(arange, 1)
+__and__: bool[1, 1] = __and__(le(arange, unsqueeze), gt(arange, sub(unsqueeze, 16)))
+embedding: f32[B, 1, 32] = embedding(embed.weight, input_ids)
-mul: f32[B, S, 8] = mul(_to_copy(unsqueeze(position_ids, 2), dtype=f32), cat)
-cos: f32[B, S, 8] = cos(mul)
-unsqueeze_2: f32[B, 1, S, 8] = unsqueeze(cos, 1)
-sin: f32[B, S, 8] = sin(mul)
-unsqueeze_3: f32[B, 1, S, 8] = unsqueeze(sin, 1)
-linear_4: f32[B, S, 64] = linear(add_2, head.weight)
+mul: f32[B, 1, 8] = mul(_to_copy(unsqueeze(position_ids, 2), dtype=f32), cat)
+cos: f32[B, 1, 8] = cos(mul)
+unsqueeze_2: f32[B, 1, 1, 8] = unsqueeze(cos, 1)
+sin: f32[B, 1, 8] = sin(mul)
+unsqueeze_3: f32[B, 1, 1, 8] = unsqueeze(sin, 1)
+linear_4: f32[B, 1, 64] = linear(add_2, head.weight)
""",
        layer=None,
    )


def test_specialize_phase_for_a_prompt_changes_ranges_alone() -> None:
    located = captured_model("llama").graphs.located
    prompt = PassManager((SpecializePhase(Phase.PREFILL, 65),)).run(located)
    assert graph_text(prompt).splitlines()[1:] == graph_text(located).splitlines()[1:]


def test_insert_kv_cache_in_prefill() -> None:
    assert_graph_diff(
        pressed(Knorm()),
        """\

+input keys_0: f32[B, 2, C_0, 16]
+input values_0: f32[B, 2, C_0, 16]
+values_out_0: f32[B, 2, C_0, 16] = slice_scatter(values_0, transpose(reshape(linear_2, [B, S, -1, 16]), 1, 2), 2, 0, S)
+keys_out_0: f32[B, 2, C_0, 16] = slice_scatter(keys_0, add_2, 2, 0, S)
+output keys_out_0: keys_out_0 -> keys_0
+output values_out_0: values_out_0 -> values_0
""",
        only="insert-kv-cache",
    )


def test_insert_kv_cache_in_extend() -> None:
    assert_graph_diff(
        pressed(Knorm()),
        """\

+input keys_0: f32[B, 2, C_0, 16]
+input values_0: f32[B, 2, C_0, 16]
-attention_0: f32[B, 4, S, 16] = scaled_dot_product_attention(add_1, add_2, transpose(reshape(linear_2, [B, S, -1, 16]), 1, 2), None, 0, True, scale=0.25, enable_gqa=True)
-linear_3: f32[B, S, 64] = linear(reshape(transpose(attention_0, 1, 2), [B, S, -1]), model.layers.0.self_attn.o_proj.weight)
+unsqueeze_9: i64[B, 1, S] = unsqueeze(add(unsqueeze(select(lengths, 0, 0), 1), arange_2), 1)
+keys_out_0: f32[B, 2, C_0, 16] = index_put(keys_0, [unsqueeze_6, unsqueeze_7, unsqueeze_9], add_2)
+values_out_0: f32[B, 2, C_0, 16] = index_put(values_0, [unsqueeze_6, unsqueeze_7, unsqueeze_9], transpose(reshape(linear_2, [B, S, -1, 16]), 1, 2))
+le_3: bool[B, S, C_0] = le(arange(C_0), unsqueeze(add(unsqueeze(select(lengths, 0, 0), 1), arange_2), 2))
+scaled_dot_product_attention: f32[B, 2, 2*S, 16] = scaled_dot_product_attention(flatten(unflatten(add_1, 1, [2, 2]), 2, 3), keys_out_0, values_out_0, flatten(expand(unsqueeze(unsqueeze(le_3, 1), 2), [-1, -1, 2, -1, -1]), 2, 3), scale=0.25)
+attended_0: f32[B, 4, S, 16] = flatten(unflatten(scaled_dot_product_attention, 2, [2, S]), 1, 2)
+linear_3: f32[B, S, 64] = linear(reshape(transpose(attended_0, 1, 2), [B, S, -1]), model.layers.0.self_attn.o_proj.weight)
+output keys_out_0: keys_out_0 -> keys_0
+output values_out_0: values_out_0 -> values_0
""",
        phase="extend",
        only="insert-kv-cache",
    )


def test_insert_kv_cache_in_decode() -> None:
    assert_graph_diff(
        pressed(Knorm()),
        """\

+input keys_0: f32[B, 2, C_0, 16]
+input values_0: f32[B, 2, C_0, 16]
-attention_0: f32[B, 4, 1, 16] = scaled_dot_product_attention(add_1, add_2, transpose(reshape(linear_2, [B, 1, -1, 16]), 1, 2), None, 0, True, scale=0.25, enable_gqa=True)
-linear_3: f32[B, 1, 64] = linear(reshape(transpose(attention_0, 1, 2), [B, 1, -1]), model.layers.0.self_attn.o_proj.weight)
+unsqueeze_9: i64[B, 1, 1] = unsqueeze(add(unsqueeze(select(lengths, 0, 0), 1), arange_2), 1)
+keys_out_0: f32[B, 2, C_0, 16] = index_put(keys_0, [unsqueeze_6, unsqueeze_7, unsqueeze_9], add_2)
+values_out_0: f32[B, 2, C_0, 16] = index_put(values_0, [unsqueeze_6, unsqueeze_7, unsqueeze_9], transpose(reshape(linear_2, [B, 1, -1, 16]), 1, 2))
+le_2: bool[B, 1, C_0] = le(arange(C_0), unsqueeze(add(unsqueeze(select(lengths, 0, 0), 1), arange_2), 2))
+scaled_dot_product_attention: f32[B, 2, 2, 16] = scaled_dot_product_attention(flatten(unflatten(add_1, 1, [2, 2]), 2, 3), keys_out_0, values_out_0, flatten(expand(unsqueeze(unsqueeze(le_2, 1), 2), [-1, -1, 2, -1, -1]), 2, 3), scale=0.25)
+attended_0: f32[B, 4, 1, 16] = flatten(unflatten(scaled_dot_product_attention, 2, [2, 1]), 1, 2)
+linear_3: f32[B, 1, 64] = linear(reshape(transpose(attended_0, 1, 2), [B, 1, -1]), model.layers.0.self_attn.o_proj.weight)
+output keys_out_0: keys_out_0 -> keys_0
+output values_out_0: values_out_0 -> values_0
""",
        phase="decode",
        only="insert-kv-cache",
    )


def test_insert_kv_cache_in_a_sliding_window_layer() -> None:
    model = compiled_model("gemma3_text", Knorm(), ratio=0.5)
    assert_graph_diff(
        model,
        """\

+input keys_0: f32[B, 2, W_0, 16]
+input values_0: f32[B, 2, W_0, 16]
-attention_0: f32[B, 4, 1, 16] = scaled_dot_product_attention(add_6, add_7, transpose(reshape(linear_2, [B, 1, -1, 16]), 1, 2), __and__, 0, False, scale=0.25, enable_gqa=True)
-linear_3: f32[B, 1, 64] = linear(reshape(transpose(attention_0, 1, 2), [B, 1, -1]), model.layers.0.self_attn.o_proj.weight)
+remainder: i64[B, 1, 1] = remainder(unsqueeze(add(unsqueeze(select(lengths, 0, 0), 1), arange_3), 1), 16)
+keys_out_0: f32[B, 2, W_0, 16] = index_put(keys_0, [unsqueeze_12, unsqueeze_13, remainder], add_7)
+values_out_0: f32[B, 2, W_0, 16] = index_put(values_0, [unsqueeze_12, unsqueeze_13, remainder], transpose(reshape(linear_2, [B, 1, -1, 16]), 1, 2))
+unsqueeze_17: i64[B, 1, 1] = unsqueeze(add(unsqueeze(select(lengths, 0, 0), 1), arange_3), 2)
+select_2: i64[B] = select(lengths, 0, 0)
+sub_2: i64[B, W_0] = sub(unsqueeze(select_2, 1), remainder(sub(unsqueeze(select_2, 1), arange(W_0)), 16))
+unsqueeze_20: i64[B, 1, W_0] = unsqueeze(sub_2, 1)
+and_1: bool[B, 1, W_0] = __and__(le(unsqueeze_20, unsqueeze_17), gt(unsqueeze_20, sub(unsqueeze_17, 16)))
+scaled_dot_product_attention: f32[B, 2, 2, 16] = scaled_dot_product_attention(flatten(unflatten(add_6, 1, [2, 2]), 2, 3), keys_out_0, values_out_0, flatten(expand(unsqueeze(unsqueeze(__and__(and_1, ge(unsqueeze_20, 0)), 1), 2), [-1, -1, 2, -1, -1]), 2, 3), scale=0.25)
+attended_0: f32[B, 4, 1, 16] = flatten(unflatten(scaled_dot_product_attention, 2, [2, 1]), 1, 2)
+linear_3: f32[B, 1, 64] = linear(reshape(transpose(attended_0, 1, 2), [B, 1, -1]), model.layers.0.self_attn.o_proj.weight)
+output keys_out_0: keys_out_0 -> keys_0
+output values_out_0: values_out_0 -> values_0
""",
        phase="decode",
        only="insert-kv-cache",
    )


def test_splice_evict() -> None:
    assert_graph_diff(
        pressed(Knorm()),
        """\

-values_out_0: f32[B, 2, C_0, 16] = slice_scatter(values_0, transpose(reshape(linear_2, [B, S, -1, 16]), 1, 2), 2, 0, S)
+keys_stored_0: f32[B, 2, C_0, 16] = slice_scatter(keys_0, keys_kept_0, 2, 0, N)
-keys_out_0: f32[B, 2, C_0, 16] = slice_scatter(keys_0, add_2, 2, 0, S)
+values_stored_0: f32[B, 2, C_0, 16] = slice_scatter(values_0, values_kept_0, 2, 0, N)
-output keys_out_0: keys_out_0 -> keys_0
-output values_out_0: values_out_0 -> values_0
+output keys_out_0: keys_stored_0 -> keys_0
+output values_out_0: values_stored_0 -> values_0
+output kept_0: kept_0
""",
        only="splice-evict",
    )


def test_write_cache_in_place() -> None:
    assert_graph_diff(
        pressed(Knorm()),
        """\

-keys_stored_0: f32[B, 2, C_0, 16] = slice_scatter(keys_0, keys_kept_0, 2, 0, N)
+keys_written_0: f32[B, 2, N, 16] = copy_(slice(keys_0, 2, 0, N), keys_kept_0)
-values_stored_0: f32[B, 2, C_0, 16] = slice_scatter(values_0, values_kept_0, 2, 0, N)
+values_written_0: f32[B, 2, N, 16] = copy_(slice(values_0, 2, 0, N), values_kept_0)
-output keys_out_0: keys_stored_0 -> keys_0
-output values_out_0: values_stored_0 -> values_0
""",
        only="write-cache-in-place",
    )


def test_write_cache_in_place_in_decode() -> None:
    assert_graph_diff(
        pressed(Knorm()),
        """\

-keys_out_0: f32[B, 2, C_0, 16] = index_put(keys_0, [unsqueeze_6, unsqueeze_7, unsqueeze_9], add_2)
-values_out_0: f32[B, 2, C_0, 16] = index_put(values_0, [unsqueeze_6, unsqueeze_7, unsqueeze_9], transpose(reshape(linear_2, [B, 1, -1, 16]), 1, 2))
+keys_out_0: f32[B, 2, C_0, 16] = index_put_(keys_0, [unsqueeze_6, unsqueeze_7, unsqueeze_9], add_2)
+values_out_0: f32[B, 2, C_0, 16] = index_put_(values_0, [unsqueeze_6, unsqueeze_7, unsqueeze_9], transpose(reshape(linear_2, [B, 1, -1, 16]), 1, 2))
-output keys_out_0: keys_out_0 -> keys_0
-output values_out_0: values_out_0 -> values_0
""",
        phase="decode",
        only="write-cache-in-place",
    )


def test_narrow_to_last_token() -> None:
    """Keys and values of the last layer stay as they are; its mask, a window, has one row."""
    located = PassManager(capture_passes()).run(capture(PlainLM("causal", "window")))
    before = PassManager(phase_passes(Phase.PREFILL, None)[:3]).run(located)
    assert_pass_diff(
        before,
        NarrowToLastToken(),
        """\

-linear_4: f32[B, S, 32] = linear(add_2, layers.1.q_proj.weight)
-transpose_4: f32[B, 4, S, 8] = transpose(reshape(linear_4, [B, S, 4, 8]), 1, 2)
+last_3: bool[1, S] = slice(__and__, 0, -1, end)
+last_1: f32[B, 1, 1, 8] = slice(unsqueeze_2, 2, -1, end)
+last_2: f32[B, 1, 1, 8] = slice(unsqueeze_3, 2, -1, end)
+last: f32[B, 1, 32] = slice(add_2, 1, -1, end)
+linear_4: f32[B, 1, 32] = linear(last, layers.1.q_proj.weight)
+transpose_4: f32[B, 4, 1, 8] = transpose(reshape(linear_4, [B, 1, 4, 8]), 1, 2)
-mul_5: f32[B, 4, S, 8] = mul(transpose_4, unsqueeze_2)
-neg_2: f32[B, 4, S, 4] = neg(slice(transpose_4, 3, 4, end))
-cat_3: f32[B, 4, S, 8] = cat([neg_2, slice(transpose_4, 3, 0, 4)], -1)
-mul_6: f32[B, 4, S, 8] = mul(cat_3, unsqueeze_3)
-add_3: f32[B, 4, S, 8] = add(mul_5, mul_6)
+mul_5: f32[B, 4, 1, 8] = mul(transpose_4, last_1)
+neg_2: f32[B, 4, 1, 4] = neg(slice(transpose_4, 3, 4, end))
+cat_3: f32[B, 4, 1, 8] = cat([neg_2, slice(transpose_4, 3, 0, 4)], -1)
+mul_6: f32[B, 4, 1, 8] = mul(cat_3, last_2)
+add_3: f32[B, 4, 1, 8] = add(mul_5, mul_6)
-attention_1: f32[B, 4, S, 8] = scaled_dot_product_attention(add_3, add_4, transpose(reshape(linear_6, [B, S, 2, 8]), 1, 2), __and__, 0, False, scale=None, enable_gqa=True)
-linear_7: f32[B, S, 32] = linear(reshape(transpose(attention_1, 1, 2), [B, S, 32]), layers.1.o_proj.weight)
-add_5: f32[B, S, 32] = add(add_2, linear_7)
+attention_1: f32[B, 4, 1, 8] = scaled_dot_product_attention(add_3, add_4, transpose(reshape(linear_6, [B, S, 2, 8]), 1, 2), last_3, 0, False, scale=None, enable_gqa=True)
+linear_7: f32[B, 1, 32] = linear(reshape(transpose(attention_1, 1, 2), [B, 1, 32]), layers.1.o_proj.weight)
+add_5: f32[B, 1, 32] = add(last, linear_7)
""",
        layer=1,
    )


def test_splice_press() -> None:
    assert_graph_diff(
        pressed(Knorm()),
        """\

+scores_0: f32[B, 2, S] = neg(linalg_vector_norm(add_2, 2, [-1], dtype=f32))
+slice_9: f32[B, 2, 1] = slice(topk(scores_0, N)[0], 2, -1, end)
+gt: bool[B, 2, S] = gt(scores_0, slice_9)
+eq: bool[B, 2, S] = eq(scores_0, slice_9)
+or_1: bool[B, 2, S] = __or__(gt, __and__(eq, le(cumsum(eq, -1), rsub(sum(gt, [-1], True), N))))
+expand: bool[B, 2, S] = expand(or_1, [B, 2, S])
+scatter: i64[B, 2, N + 1] = scatter(new_zeros, -1, where(expand, sub(cumsum(expand, -1), 1), N), expand_1)
+kept_0: i64[B, 2, N] = slice(scatter, 2, 0, N)
+keys_kept_0: f32[B, 2, N, 16] = gather(add_2, 2, expand(unsqueeze(kept_0, 3), [-1, -1, -1, 16]))
+values_kept_0: f32[B, 2, N, 16] = gather(transpose(reshape(linear_2, [B, S, -1, 16]), 1, 2), 2, expand(unsqueeze(kept_0, 3), [-1, -1, -1, 16]))
""",
        only="splice-press",
    )


def test_expected_attention_computes_the_mean_rotation_once() -> None:
    """What depends on no layer stands outside of them, read off the model's own inverse frequencies."""
    assert_graph_diff(
        pressed(ExpectedAttention()),
        """\

+input budget: f32[N]
+mul_21: f32[1, 512, 8] = mul(_to_copy(unsqueeze(add(unsqueeze(arange(512), 0), S), 2), dtype=f32), model.rotary_emb.inv_freq)
+cat_5: f32[1, 512, 16] = cat([mul_21, mul_21], -1)
+unsqueeze_10: f32[1, 1, 16, 16] = unsqueeze(unsqueeze(eye(16, dtype=f32), 0), 1)
+cat_6: f32[1, 1, 16, 16] = cat([neg(slice(unsqueeze_10, 3, 8, end)), slice(unsqueeze_10, 3, 0, 8)], -1)
+add_14: f32[1, 1, 16, 16] = add(mul(unsqueeze_10, mean(unsqueeze(cos(cat_5), 1), [2], True)), mul(cat_6, mean(unsqueeze(sin(cat_5), 1), [2], True)))
+select_1: f32[16, 16] = select(select(add_14, 0, 0), 0, 0)
+transpose_10: f32[16, 16] = transpose(select_1, -1, -2)
+expand_4: i64[B, 2, S] = expand(arange(S), [B, 2, S])
+new_zeros: i64[B, 2, N + 1] = new_zeros(expand_4, [B, 2, N + 1])
""",
        layer=None,
        only="splice-press",
    )


@pytest.mark.parametrize("phase", ["prefill", "extend", "decode"])
def test_a_whole_layer_stays_readable(phase: str) -> None:
    """All passes together change one layer by about 25 lines; the last one of a prompt is narrowed as well."""
    diff = pressed(SnapKV()).graph_diff(layer=0, phase=phase)
    assert 5 < len(diff.splitlines()) <= 27


def test_the_canonical_text_of_a_layer() -> None:
    """The line form: name, dtype, shape in our symbols, operator, arguments."""
    lines = compiled_model("llama").print_graph("decode").splitlines()
    shown = [line.strip() for line in lines if "attended_0" in line]
    assert_expected_inline(
        "\n".join(shown),
        """\
attended_0: f32[B, 4, 1, 16] = flatten(unflatten(scaled_dot_product_attention, 2, [2, 1]), 1, 2)
linear_3: f32[B, 1, 64] = linear(reshape(transpose(attended_0, 1, 2), [B, 1, -1]), model.layers.0.self_attn.o_proj.weight)""",
    )
