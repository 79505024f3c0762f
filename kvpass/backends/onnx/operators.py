"""What torch's exporter does not translate to ONNX, or not in a form that runs fast.

Functions with the signatures of torch's operators over values of ONNX, whose shapes are known; sizes may be symbols.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from onnxscript import opset18 as op
from onnxscript.function_libs.torch_lib.ops.core import aten_index_put

from kvpass.backends.onnx.matrices import cholesky, inverse

aten = torch.ops.aten
Value = Any  # of ONNX, with .shape


def linear(x: Value, weight: Value, bias: Value = None) -> Value:
    """Gemm reads the weight [N, D] as it lies: a Transpose would be folded into a second copy of it."""
    sizes = [size if isinstance(size, int) else -1 for size in x.shape]
    if sizes.count(-1) > 1:
        product = op.MatMul(x, op.Transpose(weight, perm=[1, 0]))
        return product if bias is None else op.Add(product, bias)
    rows = x if len(sizes) == 2 else op.Reshape(x, _ints([-1, sizes[-1]]))
    product = op.Gemm(rows, weight, transB=1) if bias is None else op.Gemm(rows, weight, bias, transB=1)
    return product if len(sizes) == 2 else op.Reshape(product, _ints([*sizes[:-1], weight.shape[0]]))


def attention(
    query: Value,
    key: Value,
    value: Value,
    attn_mask: Value = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Value:
    """Products and a softmax; the cache is read as it lies, its keys neither repeated nor transposed in memory.

    query [B, H, S, D], key and value [B, Hkv, T, D], attn_mask [.., S, T]. Every query sees something.
    """
    heads, kv_heads, width, width_out = query.shape[1], key.shape[1], query.shape[3], value.shape[3]
    bias = attn_mask
    if is_causal:
        rows, columns = _range(query, 2), _range(key, 2)
        bias = _bias(op.LessOrEqual(columns, op.Unsqueeze(rows, _ints([1]))), query)
    elif attn_mask is not None and attn_mask.dtype.name == "BOOL":
        bias = _bias(attn_mask, query)
    factor = width**-0.5 if scale is None else scale
    query = op.Mul(query, op.CastLike(op.Constant(value_float=factor), query))
    axes = [0, 1, 3, 2]
    if heads != kv_heads:  # the queries of a KV head in an axis of their own
        groups = [0, kv_heads, heads // kv_heads, -1]
        query = op.Reshape(query, _ints([*groups, width]))
        key, value, axes = op.Unsqueeze(key, _ints([2])), op.Unsqueeze(value, _ints([2])), [0, 1, 2, 4, 3]
        if attn_mask is not None and len(attn_mask.shape) > 2:
            bias = bias if len(attn_mask.shape) == 4 else op.Unsqueeze(bias, _ints([0]))
            own = op.Concat(_ints(groups[:3]), op.Shape(attn_mask, start=-2), axis=0)
            bias = op.Unsqueeze(bias, _ints([1])) if attn_mask.shape[-3] == 1 else op.Reshape(bias, own)
    scores = op.MatMul(query, op.Transpose(key, perm=axes))
    scores = scores if bias is None else op.Add(scores, bias)
    attended = op.MatMul(op.Softmax(scores, axis=-1), value)
    return attended if heads == kv_heads else op.Reshape(attended, _ints([0, heads, -1, width_out]))


def index_put(x: Value, indices: Sequence[Value], values: Value, accumulate: bool = False) -> Value:
    """One index for each of the first axes: nothing but a ScatterND reads the cache. Others as torch has them."""
    if accumulate or any(index is None or index.dtype.name != "INT64" for index in indices):
        return aten_index_put(x, indices, values, accumulate)
    shape = op.Shape(op.Max(*indices))
    where = op.Concat(*(op.Unsqueeze(op.Expand(index, shape), _ints([-1])) for index in indices), axis=-1)
    new = op.Expand(values, op.Concat(shape, op.Shape(x, start=len(indices)), axis=0))
    return op.ScatterND(x, where, new)


def slice_scatter(
    x: Value, new: Value, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Value:
    """All of a ring is new; a part of anything else would be copied, slot by slot."""
    if not start and step == 1 and x.shape[dim] == new.shape[dim] and isinstance(x.shape[dim], int):
        return op.Identity(new)
    first = op.Constant(value_ints=[start or 0]) if start is None or isinstance(start, int) else start
    slots = op.Add(op.Reshape(first, _ints([1])), op.Mul(_range(new, dim), _ints([step])))
    shape = [1] * len(x.shape)
    shape[dim] = -1
    return op.ScatterElements(x, op.Expand(op.Reshape(slots, _ints(shape)), op.Shape(new)), new, axis=dim)


def sort_stable(x: Value, stable: bool | None = None, dim: int = -1, descending: bool = False) -> tuple[Value, Value]:
    """Of equal values TopK has the lowest index first."""
    return _top(x, _size(x, dim), dim, largest=descending)


def topk(x: Value, k: Value, dim: int = -1, largest: bool = True, sorted: bool = True) -> tuple[Value, Value]:
    """Sorted in any case."""
    return _top(x, [k], dim, largest=largest)


def median(x: Value, dim: int = -1, keepdim: bool = False) -> tuple[Value, Value]:
    """The lower one of two, as torch has it."""
    count = op.Div(op.Add(_size(x, dim), _ints([1])), _ints([2]))
    values, indices = _top(x, count, dim, largest=False)
    last = op.Sub(count, _ints([1]))
    found = [op.Gather(each, last, axis=dim) for each in (values, indices)]
    values, indices = found if keepdim else [op.Squeeze(each, _ints([dim])) for each in found]
    return values, indices


def cholesky_ex(x: Value, upper: bool = False, check_errors: bool = False) -> tuple[Value, Value]:
    """The lower factor; info is 1 of a matrix that is not positive definite, and its factor holds NaN."""
    _expect(not upper, "an upper factor")
    factor = cholesky(x)
    wrong = op.ReduceMax(op.Cast(op.IsNaN(factor), to=6), _ints([-2, -1]), keepdims=0)
    return factor, wrong


def solve_triangular(x: Value, right: Value, upper: bool, left: bool = True, unitriangular: bool = False) -> Value:
    """X with x X = right, or X x = right; only one triangle of x [.., n, n] is read."""
    _expect(not unitriangular, "a unit diagonal")
    inverted = inverse(op.Trilu(x, upper=int(upper)))
    return op.MatMul(inverted, right) if left else op.MatMul(right, inverted)


def solve(x: Value, right: Value, left: bool = True) -> Value:
    """X with x X = right [.., n, k], or X x = right."""
    _expect(len(right.shape) == len(x.shape), "a right side that is one vector")
    return op.MatMul(inverse(x), right) if left else op.MatMul(right, inverse(x))


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    aten.linear.default: linear,
    aten.scaled_dot_product_attention.default: attention,
    aten.index_put.default: index_put,
    aten.slice_scatter.default: slice_scatter,
    aten.sort.stable: sort_stable,
    aten.topk.default: topk,
    aten.median.dim: median,
    aten.linalg_cholesky_ex.default: cholesky_ex,
    aten.linalg_solve_triangular.default: solve_triangular,
    aten.linalg_solve.default: solve,
}


def _top(x: Value, count: Value, dim: int, *, largest: bool) -> tuple[Value, Value]:
    """TopK, which takes no bfloat16 in this opset: float32 numbers have the same order."""
    cast = x.dtype.name == "BFLOAT16"
    values, indices = op.TopK(op.Cast(x, to=1) if cast else x, count, axis=dim, largest=int(largest), sorted=1)
    return op.CastLike(values, x) if cast else values, indices


def _ints(values: Sequence[int]) -> Value:
    return op.Constant(value_ints=list(values))


def _size(x: Value, dim: int) -> Value:
    """i64[1]"""
    dim %= len(x.shape)
    return op.Shape(x, start=dim, end=dim + 1)


def _range(x: Value, dim: int) -> Value:
    """0, 1, ... along an axis"""
    return op.Range(_scalar(0), op.Squeeze(_size(x, dim), _ints([0])), _scalar(1))


def _scalar(value: int) -> Value:
    return op.Constant(value_int=value)


def _bias(seen: Value, like: Value) -> Value:
    """Nothing where seen bool[..], -inf elsewhere: adding it needs no second copy of the scores."""
    zero, least = (op.CastLike(op.Constant(value_float=value), like) for value in (0.0, float("-inf")))
    return op.Where(seen, zero, least)


def _expect(given: bool, what: str) -> None:
    if not given:
        raise NotImplementedError(f"{what} is not translated")
