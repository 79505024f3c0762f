"""The only importer of torch_tensorrt and tensorrt, of either flavour, also on a machine without CUDA."""

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from kvpass.backends.tensorrt.converters import register
from kvpass.errors import PackageError

QUIET = ("torch_tensorrt", "torch_tensorrt [TensorRT Conversion Context]")


@dataclass(frozen=True)
class Library:
    """The modules, and which product they belong to."""

    torch_tensorrt: Any
    trt: Any
    flavour: str  # tensorrt, or tensorrt-rtx

    @property
    def version(self) -> str:
        return str(self.trt.__version__)

    def part(self, name: str) -> Any:
        """A module inside torch_tensorrt."""
        return importlib.import_module(f"torch_tensorrt.{name}")


@functools.cache
def library() -> Library:
    """What is installed. Raises `PackageError` with the cure if nothing is."""
    if importlib.util.find_spec("torch_tensorrt") is None:
        raise PackageError(
            "the package torch_tensorrt is not installed: pip install 'kvpass[tensorrt]' for data-centre GPUs, "
            "'kvpass[tensorrt-rtx]' for RTX GPUs and machines without one"
        )
    try:
        with _quiet(), _without_cuda():
            torch_tensorrt = importlib.import_module("torch_tensorrt")
            trt = importlib.import_module("tensorrt")  # set up by the import above, whichever it is
    except Exception as error:
        raise PackageError(
            f"torch_tensorrt cannot be imported: {error}; on a machine without CUDA only 'kvpass[tensorrt-rtx]' can be"
        ) from error
    register(trt)
    rtx = bool(torch_tensorrt.ENABLED_FEATURES.tensorrt_rtx)
    return Library(torch_tensorrt, trt, "tensorrt-rtx" if rtx else "tensorrt")


@contextmanager
def _without_cuda() -> Iterator[None]:
    """Let torch_tensorrt be imported as Python alone: its native libraries need those of CUDA."""
    if torch.cuda.is_available():
        yield
        return
    is_file = os.path.isfile

    def hide_native(path: Any) -> bool:
        return not ("torch_tensorrt" in str(path) and "libtorchtrt" in str(path)) and is_file(path)

    if not hasattr(torch._C, "_CudaDeviceProperties"):  # in an annotation
        torch._C._CudaDeviceProperties = type("_CudaDeviceProperties", (), {})  # type: ignore[misc, assignment]
    with (
        mock.patch("os.path.isfile", hide_native),
        mock.patch("torch.cuda.get_device_capability", lambda *_, **__: (8, 9)),
        mock.patch("torch.cuda.current_device", lambda: 0),
    ):
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """It warns of quantisation packages that nobody asked for."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
