"""ONNX models on disk: tensors of all of them in one file, each once."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
import onnx_ir as ir

from kvpass.backends.onnx.names import WEIGHTS

INSIDE = 128  # bytes up to which a tensor is part of the model: sizes and the like, which are folded
PAGE = 4096  # larger tensors begin where they can be mapped


def write_models(models: Mapping[str, ir.Model], folder: Path) -> None:
    """Write them, and check what was written. Raises what `onnx.checker` raises."""
    with (folder / WEIGHTS).open("wb") as file:
        weights = _Weights(file)
        for name, model in models.items():
            for value in model.graph.initializers.values():
                if value.const_value is not None and value.const_value.nbytes > INSIDE:
                    value.const_value = weights.stored(value.const_value)
            ir.save(model, folder / f"{name}.onnx")
    for name in models:
        onnx.checker.check_model(folder / f"{name}.onnx", full_check=True)


class _Weights:
    """A file of tensors that is being written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._places: dict[bytes, int] = {}

    def stored(self, tensor: ir.TensorProtocol) -> ir.ExternalTensor:
        """The tensor as a place in the file."""
        data = np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8).data
        digest = hashlib.blake2b(data).digest()
        if digest not in self._places:
            self._file.seek(-self._file.tell() % (PAGE if len(data) >= PAGE else 64), 1)
            self._places[digest] = self._file.tell()
            self._file.write(data)
        shape: Any = tensor.shape
        return ir.ExternalTensor(
            WEIGHTS, self._places[digest], len(data), tensor.dtype, shape=shape, name=str(tensor.name)
        )
