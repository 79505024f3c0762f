"""Engines that run. Skipped where there is no GPU, or no TensorRT."""

from pathlib import Path

import pytest
import torch
from deployment.tensorrt_cases import distinct_ids, needs_tensorrt
from tiny_models import tiny_model

import kvpass

pytestmark = [needs_tensorrt, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("press", ["knorm", "snapkv(window_size=8)", None])
@pytest.mark.parametrize("arch", ["llama", "gemma3_text"])
def test_greedy_text(arch: str, press: str | None, tmp_path: Path) -> None:
    """Prompts of lengths that were not traced, one of them too short for a window, continued as by the eager graphs."""
    ratio = 0.5 if press else None
    expected = kvpass.compile(tiny_model(arch), press, ratio, backend="eager")
    kvpass.compile(tiny_model(arch).cuda(), press, ratio, backend="eager").export(
        tmp_path / "engines", "tensorrt", max_tokens=200
    )
    engines = kvpass.load(tmp_path / "engines")
    for tokens in (5, 53, 149):
        ids = distinct_ids(tokens)
        text = expected.generate(ids, max_new_tokens=12, do_sample=False)
        assert torch.equal(engines.generate(ids.cuda(), 12).cpu(), text)


@pytest.mark.parametrize("arch", ["llama", "gemma3_text"])
def test_as_a_backend(arch: str) -> None:
    """kvpass runs the engines itself, over its own cache; also a batch whose rows differ in length."""
    expected = kvpass.compile(tiny_model(arch), "knorm", 0.5, backend="eager")
    sizes = {"prefill": (2, 64, 200), "extend": (2, 8, 60), "slots": (2, 100, 700)}
    model = kvpass.compile(tiny_model(arch).cuda(), "knorm", 0.5, backend="tensorrt", profile=sizes)
    ids, mask = torch.cat([distinct_ids(149), distinct_ids(149, seed=1)]), torch.ones(2, 149, dtype=torch.int64)
    mask[1, :40] = 0
    for rows in (1, 2):
        options = {"max_new_tokens": 12, "do_sample": False}
        text = expected.generate(ids[:rows], attention_mask=mask[:rows], **options)
        assert torch.equal(model.generate(ids[:rows].cuda(), attention_mask=mask[:rows].cuda(), **options).cpu(), text)
