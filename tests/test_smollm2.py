"""The real model out of its package. Runs under the oldest transformers, too: the folder is every version's."""

import importlib.metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from kvpass import smollm2


@pytest.fixture(scope="module", autouse=True)
def installed() -> None:
    try:
        smollm2.gguf_path()
    except smollm2.MissingModelError as error:
        pytest.skip(str(error))


def test_tokenizer_is_the_same_of_every_transformers(tmp_path: Path) -> None:
    """Turns are one token each, every other character comes back, and so they do of files written and read."""
    converted: Any = smollm2._tokenizer(smollm2.gguf_path())
    converted.save_pretrained(tmp_path)
    text = "<|im_start|>user\nThe naïve fox\n\n  is 73912.<|im_end|>"
    ids = [1, 4093, 198, 504, 15486, 46494, 16438, 8866, 314, 216, 39, 35, 41, 33, 34, 30, 2]
    for tokenizer in (converted, PreTrainedTokenizerFast.from_pretrained(tmp_path), smollm2.load()[1]):
        assert tokenizer(text)["input_ids"] == ids
        assert tokenizer.decode(ids) == text
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)


def test_model_is_converted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "_convert", lambda *_: pytest.fail("converted again"))
    again, _ = smollm2.load()
    assert again.dtype == torch.float32
    assert again.config.num_hidden_layers == 30


def test_a_conversion_that_breaks_off_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def break_off(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{")
        raise OSError("disk full")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(smollm2, "_convert", break_off)
    with pytest.raises(OSError, match="disk full"):
        smollm2.converted_folder()
    assert list((tmp_path / "kvpass").iterdir()) == []


def test_a_faster_process_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def convert_while_another_does(gguf: Path, folder: Path) -> None:
        version = importlib.metadata.version(smollm2.DISTRIBUTION)
        final = tmp_path / "kvpass" / f"smollm2-135m-instruct-{version}-float32-{smollm2.FORMAT}"
        for place, text in ((folder, "ours"), (final, "theirs")):
            place.mkdir()
            (place / "config.json").write_text(text)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(smollm2, "_convert", convert_while_another_does)
    folder = smollm2.converted_folder()
    assert (folder / "config.json").read_text() == "theirs"
    assert list((tmp_path / "kvpass").iterdir()) == [folder]
