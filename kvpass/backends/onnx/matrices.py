"""Factors and inverses of small matrices as loops, which ONNX has no operators for."""

from onnxscript import FLOAT, script
from onnxscript import opset18 as op
from onnxscript.values import Opset

DOMAIN = Opset("kvpass", 1)  # functions are inlined, nothing of it is left in a model


@script(DOMAIN)  # type: ignore[untyped-decorator]
def cholesky(x: FLOAT) -> FLOAT:
    """The lower factor of positive definite x [.., n, n]; NaN of others."""
    size = op.Squeeze(op.Shape(x, start=-1))
    rows = op.Range(0, size, 1)
    rest = op.Identity(x)
    factor = op.Sub(x, x)
    for j in range(size):
        unit = op.CastLike(op.Equal(rows, j), x)  # [n]
        column = op.Where(op.Less(rows, j), op.CastLike(0.0, x), op.MatMul(rest, unit))
        pivot = op.MatMul(column, op.Unsqueeze(unit, [1]))  # [.., 1]
        column = op.Div(column, op.Sqrt(pivot))
        outer = op.Mul(op.Unsqueeze(column, [-1]), op.Unsqueeze(column, [-2]))
        rest = op.Sub(rest, outer)
        factor = op.Add(factor, op.Mul(op.Unsqueeze(column, [-1]), unit))
    return factor


@script(DOMAIN)  # type: ignore[untyped-decorator]
def inverse(x: FLOAT) -> FLOAT:
    """The inverse of x [.., n, n], by elimination with row pivots."""
    size = op.Squeeze(op.Shape(x, start=-1))
    rows = op.Range(0, size, 1)
    columns = op.Range(0, size + size, 1)
    unit_matrix = op.CastLike(op.Equal(op.Unsqueeze(rows, [1]), rows), x)
    joined = op.Concat(x, op.Expand(unit_matrix, op.Shape(x)), axis=-1)  # [.., n, 2n]
    for j in range(size):
        column = op.MatMul(joined, op.CastLike(op.Equal(columns, j), x))  # [.., n]
        candidates = op.Where(op.Less(rows, j), op.CastLike(-1.0, x), op.Abs(column))
        pivot_row = op.ArgMax(candidates, axis=-1, keepdims=1)  # [.., 1]
        order = op.Where(op.Equal(rows, j), pivot_row, op.Where(op.Equal(rows, pivot_row), j, rows))
        swapped = op.GatherElements(joined, op.Expand(op.Unsqueeze(order, [-1]), op.Shape(joined)), axis=-2)
        column = op.MatMul(swapped, op.CastLike(op.Equal(columns, j), x))
        here = op.CastLike(op.Equal(rows, j), x)
        row = op.MatMul(op.Unsqueeze(here, [0]), swapped)  # [.., 1, 2n]
        row = op.Div(row, op.MatMul(row, op.Unsqueeze(op.CastLike(op.Equal(columns, j), x), [1])))
        others = op.Sub(swapped, op.Mul(op.Unsqueeze(column, [-1]), row))
        joined = op.Where(op.Unsqueeze(op.Equal(rows, j), [1]), row, others)
    return op.Slice(joined, op.Unsqueeze(size, [0]), op.Unsqueeze(size + size, [0]), [-1])
