"""Learned tensors of presses: from a file, a folder or a hub repository; nothing is ever unpickled as code."""

import functools
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from kvpass.errors import PressError
from kvpass.press import ModelFacts

FILES = ("model.safetensors", "pytorch_model.bin", "model.pt")


def load_tensors(source: str, press: str, option: str, facts: ModelFacts) -> Mapping[str, Tensor]:
    """All tensors of `source`: a .safetensors, .pt or .bin file, a folder with one, or a hub id.

    `option` is the field of the press that names another source. Raises `PressError` if there is nothing to load.
    """
    path = Path(source).expanduser()
    try:
        file = _file_in(path) if path.exists() else _download(source)
        stat = file.stat()  # a file that was written anew is read anew
        return _load(str(file), stat.st_mtime_ns, stat.st_size)
    except (OSError, ValueError, RuntimeError, EOFError, SafetensorError) as error:
        reason = next(iter(str(error).splitlines()), "no more is known")
        raise PressError(
            f"{press}: nothing to load from {source!r} for the model {facts.name or '(without a name)'!r} "
            f"({type(error).__name__}: {reason}); give {option}= a local file or folder, or a hub "
            "id. `kvpass calibrate` makes the files of qfilter and expected_attention_stats for any model"
        ) from error


@functools.lru_cache(maxsize=8)
def _load(path: str, modified: int, size: int) -> Mapping[str, Tensor]:
    if path.endswith(".safetensors"):
        return load_file(path)
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # its text tells how to run the code, the last thing to advise
        raise ValueError("the file is damaged or holds more than tensors; code in it is never run") from error
    if not isinstance(stored, dict) or not all(isinstance(value, Tensor) for value in stored.values()):
        raise ValueError(f"the file holds a {type(stored).__name__}, expected a dict of tensors")
    return stored


def _file_in(path: Path) -> Path:
    if path.is_file():
        return path
    found = [path / name for name in FILES if (path / name).is_file()]
    found += sorted(path.glob("*.safetensors"))
    if not found:
        raise FileNotFoundError(f"the folder holds none of {', '.join(FILES)}")
    return found[0]


def _download(source: str) -> Path:
    from huggingface_hub import hf_hub_download  # comes with transformers

    error: Exception | None = None
    for name in FILES[:2]:
        try:
            return Path(hf_hub_download(source, name))
        except OSError as found:  # no such file, or offline
            error = found
    raise FileNotFoundError(str(error))


def tensor_of(press: str, source: str, stored: Mapping[str, Tensor], name: str) -> Tensor:
    """The tensor of that name. Raises `PressError` with what is there if it is not."""
    if name not in stored:
        held = ", ".join(sorted(stored)[:4]) + (", ..." if len(stored) > 4 else "")
        raise PressError(
            f"{press}: {source} has no tensor {name!r}, it holds {held or 'nothing'}; give a file that was made for "
            f"{press}, such as `kvpass calibrate --method {press}` writes"
        )
    return stored[name]


def expect_shape(press: str, source: str, name: str, tensor: Tensor, shape: Sequence[int | None]) -> None:
    """Raise `PressError` unless the tensor has this shape; None fits any size."""
    fits = tensor.dim() == len(shape) and all(
        size is None or size == found for size, found in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        wanted = [size if size is not None else "any" for size in shape]
        raise PressError(
            f"{press}: {name} of {source} is {list(tensor.shape)}, this model needs {wanted}; it was made for another "
            "model, give the file of this one"
        )


def short_name(model: str, *, meta_llama: bool = False) -> str:
    """The last part of a checkpoint's name; with `meta_llama` as the authors of Q-Filters shorten it."""
    name = model.rstrip("/").split("/")[-1] or "unknown"
    if meta_llama and name != "Meta-Llama-3.1-405B":
        name = name.replace("Meta-Llama", "Llama")
    return name
