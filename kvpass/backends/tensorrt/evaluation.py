"""What a TensorRT network computes, layer by layer on the CPU: a reference for machines without a GPU.

It follows the definition of the layers, not the kernels of an engine, so it finds wrong conversions. Where TensorRT
leaves something open (which of equal scores is first, what duplicates in a scatter leave), torch decides.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kvpass.backends.tensorrt.library import library

Given = Sequence[Tensor | None]  # None: an optional input that is not there


def evaluate(network: Any, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """The outputs of an `INetworkDefinition` for inputs by name, in its order.

    Raises `NotImplementedError` for a layer that is unknown here, and `AssertionError` if a value has another shape or
    type than TensorRT inferred.
    """
    return _Evaluation(network).run(inputs)


class _Evaluation:
    def __init__(self, network: Any) -> None:
        self._network, self._trt = network, library().trt
        trt = self._trt
        self._dtypes = {
            trt.DataType.FLOAT: torch.float32,
            trt.DataType.HALF: torch.float16,
            trt.DataType.BF16: torch.bfloat16,
            trt.DataType.INT32: torch.int32,
            trt.DataType.INT64: torch.int64,
            trt.DataType.INT8: torch.int8,
            trt.DataType.BOOL: torch.bool,
        }
        self._attention: Tensor | None = None  # between the two layers that stand for it

    def run(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        network = self._network
        values = dict(inputs)
        for layer in self._ordered(values):
            given = [
                None if (tensor := layer.get_input(i)) is None else values[tensor.name] for i in range(layer.num_inputs)
            ]
            for index, value in enumerate(self._outputs(layer, given)):
                tensor = layer.get_output(index)
                self._check(layer, tensor, value)
                values[tensor.name] = value
        return [values[network.get_output(i).name] for i in range(network.num_outputs)]

    def _ordered(self, inputs: Mapping[str, Tensor]) -> list[Any]:
        """The layers, each behind those that it reads."""
        known, ordered = set(inputs), []
        left = [self._network.get_layer(i) for i in range(self._network.num_layers)]
        while left:
            later = []
            for layer in left:
                needed = [tensor.name for i in range(layer.num_inputs) if (tensor := layer.get_input(i)) is not None]
                if known.issuperset(needed):
                    ordered.append(layer)
                    known.update(layer.get_output(i).name for i in range(layer.num_outputs))
                else:
                    later.append(layer)
            assert len(later) < len(left), "the network has a cycle, or an input is missing"
            left = later
        return ordered

    def _outputs(self, layer: Any, given: Given) -> Sequence[Tensor]:
        kind = layer.type.name
        if kind not in LAYERS:
            raise NotImplementedError(f"layer {layer.name} of type {kind}")
        name, function = LAYERS[kind]
        layer.__class__ = getattr(self._trt, name)  # a layer of a network shows the attributes of its base class alone
        found = function(self, layer, *given)
        return found if isinstance(found, tuple) else (found,)

    def _check(self, layer: Any, tensor: Any, value: Tensor) -> None:
        shape = tuple(tensor.shape)
        fits = len(shape) == value.dim() and all(s in (-1, n) for s, n in zip(shape, value.shape, strict=True))
        assert fits and value.dtype == self._dtypes[tensor.dtype], (
            f"layer {layer.name}: {value.dtype} {tuple(value.shape)}, TensorRT expects {tensor.dtype} {shape}"
        )

    # -- one method for each type of layer ---------------------------------------------------------------------

    def constant(self, layer: Any) -> Tensor:
        weights = layer.weights
        numbers = np.array(weights if isinstance(weights, np.ndarray) else weights.numpy())
        dtype = self._dtypes[layer.get_output(0).dtype]
        stored = torch.from_numpy(numbers)
        stored = stored.view(dtype) if dtype == torch.bfloat16 and stored.dtype == torch.int16 else stored.to(dtype)
        return stored.reshape(tuple(layer.shape))

    def elementwise(self, layer: Any, a: Tensor, b: Tensor) -> Tensor:
        return ELEMENTWISE[layer.op.name](a, b)

    def unary(self, layer: Any, x: Tensor) -> Tensor:
        return UNARY[layer.op.name](x)

    def activation(self, layer: Any, x: Tensor) -> Tensor:
        kind = self._trt.IActivationLayer.type.__get__(layer).name  # `type` hides that of the layer
        if kind == "CLIP":
            return x.clamp(layer.alpha, layer.beta)
        return ACTIVATIONS[kind](x)

    def cast(self, layer: Any, x: Tensor) -> Tensor:
        return x.to(self._dtypes[layer.to_type])

    def identity(self, layer: Any, x: Tensor) -> Tensor:
        return x

    def shape(self, layer: Any, x: Tensor) -> Tensor:
        return torch.tensor(x.shape, dtype=torch.int64)

    def concatenation(self, layer: Any, *parts: Tensor) -> Tensor:
        return torch.cat(parts, layer.axis)

    def select(self, layer: Any, condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.where(condition, a, b)

    def softmax(self, layer: Any, x: Tensor) -> Tensor:
        (axis,) = _axes(layer.axes, x.dim())
        return torch.softmax(x, axis)

    def cumulative(self, layer: Any, x: Tensor, axis: Tensor) -> Tensor:
        assert layer.op.name == "SUM" and not layer.exclusive and not layer.reverse
        return x.cumsum(int(axis)).to(x.dtype)

    def shuffle(self, layer: Any, x: Tensor, size: Tensor | None = None) -> Tensor:
        x = _permuted(x, layer.first_transpose)
        shape = _dims(lambda: layer.reshape_dims) if size is None else _numbers(size)
        if shape is not None:
            if layer.zero_is_placeholder:
                shape = [x.shape[i] if n == 0 else n for i, n in enumerate(shape)]
            x = x.reshape(shape)
        return _permuted(x, layer.second_transpose)

    def unsqueeze(self, layer: Any, x: Tensor, axes: Tensor) -> Tensor:
        found = _numbers(axes)
        for axis in sorted(axis % (x.dim() + len(found)) for axis in found):
            x = x.unsqueeze(axis)
        return x

    def squeeze(self, layer: Any, x: Tensor, axes: Tensor) -> Tensor:
        return x.squeeze(tuple(axis % x.dim() for axis in _numbers(axes)))

    def slice(
        self,
        layer: Any,
        x: Tensor,
        start: Tensor | None = None,
        size: Tensor | None = None,
        stride: Tensor | None = None,
        fill: Tensor | None = None,
        axes: Tensor | None = None,
    ) -> Tensor:
        if layer.mode.name != "STRICT_BOUNDS":
            raise NotImplementedError(f"layer {layer.name}: slice of mode {layer.mode.name}")
        starts = list(layer.start) if start is None else _numbers(start)
        sizes = list(layer.shape) if size is None else _numbers(size)
        strides = list(layer.stride) if stride is None else _numbers(stride)
        along = _numbers(axes) if axes is not None else _dims(lambda: layer.axes) or range(x.dim())
        for axis, first, count, step in zip(along, starts, sizes, strides, strict=False):
            x = x.index_select(axis, first + torch.arange(count) * step)
        return x

    def gather(self, layer: Any, x: Tensor, index: Tensor) -> Tensor:
        index, mode, axis = index.long(), layer.mode.name, layer.axis
        if mode == "ELEMENT":
            return x.gather(axis, index)
        if layer.num_elementwise_dims:
            raise NotImplementedError(f"layer {layer.name}: gather with elementwise axes")
        if mode == "ND":
            return x[tuple(index.unbind(-1))]
        shape = (*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])
        return x.index_select(axis, index.reshape(-1)).reshape(shape)

    def scatter(self, layer: Any, x: Tensor, index: Tensor, new: Tensor) -> Tensor:
        index = index.long()
        if layer.mode.name == "ELEMENT":
            longer = [i for i in range(x.dim()) if index.shape[i] > x.shape[i]]
            assert not longer, f"layer {layer.name}: the index is longer than the data along {longer}"
            return x.scatter(layer.axis, index, new)
        return x.index_put(tuple(index.unbind(-1)), new)

    def matrix_multiply(self, layer: Any, a: Tensor, b: Tensor) -> Tensor:
        a, b = (
            x.transpose(-1, -2) if op.name == "TRANSPOSE" else x
            for x, op in zip((a, b), (layer.op0, layer.op1), strict=True)
        )
        return a @ b

    def reduce(self, layer: Any, x: Tensor) -> Tensor:
        axes, keep = _axes(layer.axes, x.dim()), layer.keep_dims
        return REDUCTIONS[layer.op.name](x, dim=axes, keepdim=keep).to(x.dtype)

    def top_k(self, layer: Any, x: Tensor, count: Tensor | None = None) -> tuple[Tensor, Tensor]:
        (axis,) = _axes(layer.axes, x.dim())
        k = layer.k if count is None else int(count)
        values, index = x.topk(k, dim=axis, largest=layer.op.name == "MAX")
        return values, index.to(self._dtypes[layer.get_output(1).dtype])

    def fill(
        self, layer: Any, size: Tensor | None = None, alpha: Tensor | None = None, beta: Tensor | None = None
    ) -> Tensor:
        if layer.operation.name != "LINSPACE":
            raise NotImplementedError(f"layer {layer.name}: fill with {layer.operation.name}")
        shape = list(layer.shape) if size is None else _numbers(size)
        first = torch.tensor(layer.alpha) if alpha is None else alpha
        steps = (torch.tensor(layer.beta) if beta is None else beta).reshape(-1)
        found = first.double().reshape([1] * len(shape)).expand(shape)
        for axis, count in enumerate(shape):
            step = float(steps[axis]) if len(steps) == len(shape) else 0.0
            line = torch.arange(count, dtype=torch.float64) * step
            found = found + line.reshape([-1 if i == axis else 1 for i in range(len(shape))])
        return found.to(self._dtypes[layer.get_output(0).dtype])

    def attention_input(
        self, layer: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        self._attention = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=layer.attention.causal and mask is None,
            scale=1.0,  # queries are scaled by a layer before
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return (q, k, v)[: layer.num_outputs]

    def attention_output(self, layer: Any, *given: Tensor) -> Tensor:
        assert self._attention is not None
        return self._attention


def _axes(mask: int, rank: int) -> list[int]:
    return [axis for axis in range(rank) if (mask >> axis) & 1]


def _numbers(tensor: Tensor) -> list[int]:
    return [int(number) for number in tensor.reshape(-1)]


def _dims(read: Callable[[], Any]) -> list[int] | None:
    """None where they were never set."""
    try:
        return list(read())
    except ValueError:
        return None


def _permuted(x: Tensor, order: Any) -> Tensor:
    axes = list(order)[: x.dim()]
    return x.permute(axes) if sorted(axes) == list(range(x.dim())) else x


def _divided(a: Tensor, b: Tensor) -> Tensor:
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


ELEMENTWISE: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "SUM": torch.add,
    "SUB": torch.sub,
    "PROD": torch.mul,
    "DIV": _divided,
    "FLOOR_DIV": lambda a, b: torch.div(a, b, rounding_mode="floor"),
    "POW": torch.pow,
    "MAX": torch.maximum,
    "MIN": torch.minimum,
    "AND": torch.logical_and,
    "OR": torch.logical_or,
    "XOR": torch.logical_xor,
    "EQUAL": torch.eq,
    "GREATER": torch.gt,
    "LESS": torch.lt,
}
UNARY: Mapping[str, Callable[[Tensor], Tensor]] = {
    "EXP": torch.exp,
    "LOG": torch.log,
    "SQRT": torch.sqrt,
    "RECIP": torch.reciprocal,
    "ABS": torch.abs,
    "NEG": torch.neg,
    "SIN": torch.sin,
    "COS": torch.cos,
    "CEIL": torch.ceil,
    "FLOOR": torch.floor,
    "ERF": torch.erf,
    "NOT": torch.logical_not,
    "SIGN": torch.sign,
    "ROUND": torch.round,
    "ISINF": torch.isinf,
    "ISNAN": torch.isnan,
}
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "SIGMOID": torch.sigmoid,
    "RELU": torch.relu,
    "TANH": torch.tanh,
    "GELU_ERF": F.gelu,
    "GELU_TANH": lambda x: F.gelu(x, approximate="tanh"),
}
REDUCTIONS: Mapping[str, Callable[..., Tensor]] = {
    "SUM": torch.sum,
    "AVG": torch.mean,
    "MAX": torch.amax,
    "MIN": torch.amin,
}
LAYERS: Mapping[str, tuple[str, Callable[..., Any]]] = {
    "CONSTANT": ("IConstantLayer", _Evaluation.constant),
    "ELEMENTWISE": ("IElementWiseLayer", _Evaluation.elementwise),
    "UNARY": ("IUnaryLayer", _Evaluation.unary),
    "ACTIVATION": ("IActivationLayer", _Evaluation.activation),
    "CAST": ("ICastLayer", _Evaluation.cast),
    "IDENTITY": ("IIdentityLayer", _Evaluation.identity),
    "SHAPE": ("IShapeLayer", _Evaluation.shape),
    "CONCATENATION": ("IConcatenationLayer", _Evaluation.concatenation),
    "SELECT": ("ISelectLayer", _Evaluation.select),
    "SOFTMAX": ("ISoftMaxLayer", _Evaluation.softmax),
    "CUMULATIVE": ("ICumulativeLayer", _Evaluation.cumulative),
    "SHUFFLE": ("IShuffleLayer", _Evaluation.shuffle),
    "UNSQUEEZE": ("IUnsqueezeLayer", _Evaluation.unsqueeze),
    "SQUEEZE": ("ISqueezeLayer", _Evaluation.squeeze),
    "SLICE": ("ISliceLayer", _Evaluation.slice),
    "GATHER": ("IGatherLayer", _Evaluation.gather),
    "SCATTER": ("IScatterLayer", _Evaluation.scatter),
    "MATRIX_MULTIPLY": ("IMatrixMultiplyLayer", _Evaluation.matrix_multiply),
    "REDUCE": ("IReduceLayer", _Evaluation.reduce),
    "TOPK": ("ITopKLayer", _Evaluation.top_k),
    "FILL": ("IFillLayer", _Evaluation.fill),
    "ATTENTION_INPUT": ("IAttentionInputLayer", _Evaluation.attention_input),
    "ATTENTION_OUTPUT": ("IAttentionOutputLayer", _Evaluation.attention_output),
}
