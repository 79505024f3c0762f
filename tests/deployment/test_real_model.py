"""A real model as a package: the programs of SmolLM2 write what kvpass writes."""

import pydoc_data.topics
from pathlib import Path

import pytest
import torch

import kvpass
from kvpass import smollm2

LENGTHS = (97, 311, 500)  # none an example's
NEW = 12


def test_greedy_text(tmp_path: Path) -> None:
    """Behind texts of three lengths; half of their pairs are dropped."""
    try:
        model, tokenizer = smollm2.load()
    except smollm2.MissingModelError as error:
        pytest.skip(str(error))
    compiled = kvpass.compile(model, "snapkv", 0.5, backend="eager")
    compiled.export(tmp_path / "package", max_tokens=512)
    deployed = kvpass.load(tmp_path / "package")
    text = tokenizer(pydoc_data.topics.topics["assignment"], return_tensors="pt").input_ids
    for tokens in LENGTHS:
        ids = text[:, :tokens]
        expected = compiled.generate(ids, max_new_tokens=NEW, do_sample=False)
        assert torch.equal(deployed.generate(ids, NEW), expected), tokens
