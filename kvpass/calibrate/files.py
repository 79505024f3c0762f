"""What calibration reads and writes: a model, texts, a file of tensors."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from kvpass import smollm2
from kvpass.errors import InputError, UnsupportedModelError


def load_model(model: str) -> tuple[Any, Any]:
    """A causal LM in the dtype of its checkpoint and its tokenizer, on the GPU if there is one.

    model: a folder, a hub id, or "smollm2" for the model of `kvpass demo`. Raises `UnsupportedModelError` if there is
    nothing to load, `MissingModelError` if the package of smollm2 is not installed.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    # The command owns its output: transformers' bars on stderr would tear the spinner line.
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if model == "smollm2":
        found, tokenizer = smollm2.load()
    else:
        try:
            found = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
            tokenizer = AutoTokenizer.from_pretrained(model)
        except (OSError, ValueError) as error:
            raise UnsupportedModelError(
                f"no model and tokenizer to load from {model!r} ({type(error).__name__}: {first_line(error)}); give a "
                "folder of transformers, a hub id, or smollm2"
            ) from error
    return found.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def read_samples(texts: Sequence[Path], tokenizer: Any, max_tokens: int) -> list[Tensor]:
    """The first `max_tokens` tokens of each text, as a prompt begins, i64[S].

    Raises `InputError` if a file cannot be read, is no UTF-8 or is empty.
    """
    samples = []
    for path in texts:
        try:
            text = path.expanduser().read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"no text to read from {str(path)!r} ({first_line(error)})") from error
        if not text.strip():
            raise InputError(f"the text {str(path)!r} is empty; calibration needs some hundred tokens of real text")
        ids = tokenizer(text, truncation=True, max_length=max_tokens)["input_ids"]
        samples.append(torch.tensor(ids, dtype=torch.int64))
    return samples


def prepared(out: str | Path) -> Path:
    """Where the tensors go: `out` itself if it ends with .safetensors, else model.safetensors in the folder `out`.

    The folder is made. Raises `InputError` for another kind of file, or if there can be no such folder.
    """
    path = Path(out).expanduser()
    if path.suffix != ".safetensors":
        if path.is_file() or path.suffix in (".pt", ".bin", ".pth"):
            raise InputError(f"{str(out)!r} is neither a .safetensors file nor a folder, which are what is written")
        path = path / "model.safetensors"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {str(path)!r} ({first_line(error)})") from error
    return path


def save(tensors: Mapping[str, Tensor], out: str | Path, about: Mapping[str, str] | None = None) -> Path:
    """Write what `calibrate` learned to a .safetensors file, or into a folder; returns the file.

    about: notes that are written along. A file that is there is replaced as a whole: whoever has it mapped keeps what
    it was. Raises `InputError` if it cannot be written.
    """
    path = prepared(out)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as work:
            unfinished = Path(work) / path.name
            save_file(dict(tensors), unfinished, metadata={"format": "pt", **(about or {})})
            unfinished.replace(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write {str(path)!r} ({first_line(error)})") from error
    return path


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return next(iter(str(error).splitlines()), type(error).__name__)
