"""The ways to run a press that need no export: what inductor makes of it, and what was saved and loaded."""

from pathlib import Path

import pytest
import torch
from deployment.packages import LENGTHS, NEW, PRESSES, expected, model_with
from models import captured_model, token_ids

import kvpass
from kvpass import CompiledModel


def check_text(model: CompiledModel, press: str) -> None:
    model.generation_config.eos_token_id = 255
    for tokens in LENGTHS:
        found = model.generate(token_ids(1, tokens), max_new_tokens=NEW, do_sample=False)
        assert torch.equal(found, expected("llama", press, tokens)), tokens


@pytest.mark.parametrize("press", PRESSES)
def test_inductor(press: str) -> None:
    check_text(kvpass.compile(captured_model("llama"), press, 0.5, backend="inductor"), press)


@pytest.mark.parametrize("press", PRESSES)
def test_saved_and_loaded(press: str, tmp_path: Path) -> None:
    model_with("llama", press).save(tmp_path / "model")
    loaded = kvpass.load(tmp_path / "model")
    assert isinstance(loaded, CompiledModel)
    check_text(loaded, press)
