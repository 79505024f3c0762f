"""One phase in ONNX Runtime: tensors of torch in and out, state where it lies."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from kvpass.backends.onnx.names import IN_PLACE, STATE
from kvpass.errors import InputError

TYPES: dict[torch.dtype, Any] = {
    torch.float32: np.float32,
    torch.float16: np.float16,
    torch.int64: np.int64,
}


def session_options(threads: int | None) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    # Packed weights would be a copy for each phase.
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    return options


class Session:
    """A model, and which of its outputs are new state."""

    def __init__(self, path: Path, options: onnxruntime.SessionOptions) -> None:
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._inputs = [value.name for value in self._session.get_inputs()]
        outputs = [value.name for value in self._session.get_outputs()]
        self._state = [name for name in self._inputs if f"{name}{STATE}" in outputs]
        self._in_place = self._session.get_modelmeta().custom_metadata_map[IN_PLACE].split()
        self._others = [name for name in outputs if name.removesuffix(STATE) not in self._state]

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs that are no state; that is updated in the memory of the inputs."""
        given = {name: _checked(name, inputs) for name in self._inputs}
        aside = {name: torch.empty_like(given[name]) for name in self._state if name not in self._in_place}
        binding = self._session.io_binding()
        for name, tensor in given.items():
            binding.bind_input(name, *_place(tensor))
        for name in self._state:
            binding.bind_output(f"{name}{STATE}", *_place(aside.get(name, given[name])))
        for name in self._others:
            binding.bind_output(name, "cpu")
        options = onnxruntime.RunOptions()
        if given["input_ids"].shape[1] > 1:  # what many tokens took is given back
            options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        self._session.run_with_iobinding(binding, options)
        for name, value in aside.items():
            given[name].copy_(value)
        values = binding.get_outputs()[len(self._state) :]
        return {name: from_dlpack(value) for name, value in zip(self._others, values, strict=True)}


def _place(tensor: Tensor) -> tuple[str, int, Any, tuple[int, ...], int]:
    """Where a tensor lies, as ONNX Runtime takes it: nothing is copied."""
    return "cpu", 0, TYPES[tensor.dtype], tuple(tensor.shape), tensor.data_ptr()


def _checked(name: str, inputs: Mapping[str, Tensor]) -> Tensor:
    tensor = inputs.get(name)
    if tensor is None:
        raise InputError(f"the graph reads {name}, which is not among {', '.join(inputs)}")
    if tensor.device.type != "cpu" or not tensor.is_contiguous() or tensor.dtype not in TYPES:
        raise InputError(f"{name} must be a contiguous tensor on the CPU, of {', '.join(map(str, TYPES))}")
    return tensor
