"""All that a graph knows of a tensor."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import SymInt, Tensor

from kvpass.ir.symbols import SymbolicShapes, expression


@dataclass(frozen=True)
class Kind:
    """Sizes and strides of a tensor as expressions, its dtype and device."""

    shape: tuple[Any, ...]
    stride: tuple[Any, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> "Kind":
        shape, stride = ([expression(size) for size in sizes] for sizes in (tensor.shape, tensor.stride()))
        return cls(tuple(shape), tuple(stride), tensor.dtype, tensor.device)

    @classmethod
    def contiguous(cls, tensor: Tensor) -> "Kind":
        shape = tuple(expression(size) for size in tensor.shape)
        stride = tuple(sympy.Mul(*shape[axis + 1 :]) for axis in range(len(shape)))
        return cls(shape, stride, tensor.dtype, tensor.device)

    def replaced(self, symbols: Mapping[Any, Any]) -> "Kind":
        shape, stride = (tuple(size.xreplace(symbols) for size in sizes) for sizes in (self.shape, self.stride))
        return Kind(shape, stride, self.dtype, self.device)

    def fake(self, shapes: SymbolicShapes) -> Tensor:
        with shapes.fake_mode:
            shape, stride = ([shapes.size(size) for size in sizes] for sizes in (self.shape, self.stride))
            return torch.empty_strided(shape, stride, dtype=self.dtype, device=self.device)


def with_sizes(value: Any, symbols: Mapping[Any, Any], shapes: SymbolicShapes) -> Any:
    """A value of a node with other symbols in its sizes."""
    match value:
        case Tensor():
            return Kind.of(value).replaced(symbols).fake(shapes)
        case SymInt():
            return shapes.size(expression(value).xreplace(symbols))
        case list() | tuple():
            return type(value)(with_sizes(part, symbols, shapes) for part in value)
        case _:
            return value
