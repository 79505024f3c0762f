"""Converters of our own, where those of torch_tensorrt refuse a flavour, or forget a type or a size."""

import importlib
from collections.abc import Callable
from typing import Any

import torch

aten = torch.ops.aten
Converter = Callable[[Any, Any, Any, Any, str], Any]  # context, operator, arguments, keyword arguments, name


def register(trt: Any) -> None:
    """Put them before those of torch_tensorrt."""
    registry = importlib.import_module("torch_tensorrt.dynamo.conversion._ConverterRegistry")
    utils = importlib.import_module("torch_tensorrt.dynamo.conversion.converter_utils")
    impl = importlib.import_module("torch_tensorrt.dynamo.conversion.impl")
    enums = importlib.import_module("torch_tensorrt._enums")
    source = utils.SourceIR.ATEN
    high = registry.ConverterPriority.HIGH

    def converter(target: Any, validator: Any = None) -> Callable[[Converter], Converter]:
        def decorate(function: Converter) -> Converter:
            registered: Converter = registry.dynamo_tensorrt_converter(
                target, priority=high, supports_dynamic_shapes=True, capability_validator=validator
            )(function)
            return registered

        return decorate

    def dtype_of(node: Any) -> Any:
        return enums.dtype._from(node.meta["val"].dtype).to(trt.DataType)

    def cast(ctx: Any, tensor: Any, dtype: Any, name: str, target: Any) -> Any:
        return utils.cast_trt_tensor(ctx, tensor, dtype, name, target, source)

    @converter(aten.cumsum.default)
    def cumsum(ctx: Any, target: Any, args: Any, kwargs: Any, name: str) -> Any:
        """The flavour for RTX refuses it, the other one unrolls a loop of float32."""
        values = cast(ctx, args[0], dtype_of(ctx.current_node), f"{name}_cast", target)
        axis = utils.get_trt_tensor(ctx, args[1] % len(values.shape), f"{name}_axis", dtype=trt.int32, min_rank=0)
        layer = ctx.net.add_cumulative(values, axis, trt.CumulativeOperation.SUM, False, False)
        utils.set_layer_name(layer, target, name, source)
        return layer.get_output(0)

    @converter(aten.arange.start_step)
    def arange(ctx: Any, target: Any, args: Any, kwargs: Any, name: str) -> Any:
        """In the type of the graph rather than int32, which a scatter would not mix."""
        start, end, step = (*args, 1)[:3]
        found = impl.arange.arange(ctx, target, source, name, start, end, step)
        return cast(ctx, found, dtype_of(ctx.current_node), f"{name}_cast", target)

    def fills_with_a_size(node: Any, settings: Any = None) -> bool:
        return isinstance(node.args[1], torch.fx.Node)

    @converter(aten.full.default, fills_with_a_size)
    def full(ctx: Any, target: Any, args: Any, kwargs: Any, name: str) -> Any:
        """Filled with a size, not a number."""
        zeros = impl.full.full(ctx, target, source, f"{name}_zeros", args[0], 0, kwargs.get("dtype"))
        size = cast(ctx, args[1], dtype_of(ctx.current_node), f"{name}_cast", target)
        return impl.elementwise.add(ctx, target, source, name, zeros, size)

    @converter(torch.sym_max)
    def sym_max(ctx: Any, target: Any, args: Any, kwargs: Any, name: str) -> Any:
        """As there is sym_min."""
        return impl.elementwise.max(ctx, target, source, name, args[0], args[1])

    @converter(aten._local_scalar_dense.default)
    def read(ctx: Any, target: Any, args: Any, kwargs: Any, name: str) -> Any:
        """A count that a table gives, as a size."""
        return impl.shuffle.reshape(ctx, target, source, name, args[0], (1,))
