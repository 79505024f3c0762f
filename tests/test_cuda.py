"""The same graphs on a GPU. Skipped where there is none."""

import pytest
import torch
from models import token_ids
from tiny_models import tiny_model

import kvpass

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize(("backend", "mode"), [("eager", None), ("inductor", None), ("inductor", "reduce-overhead")])
def test_equal_to_the_cpu(backend: str, mode: str | None) -> None:
    """Kept positions and greedy tokens of a compressed prompt, with room to grow on the way."""
    ids = token_ids(2, 133)
    on_cpu = kvpass.compile(tiny_model("llama"), press="snapkv", ratio=0.5, backend="eager")
    on_gpu = kvpass.compile(tiny_model("llama").cuda(), press="snapkv", ratio=0.5, backend=backend, mode=mode)
    expected = on_cpu.generate(ids, max_new_tokens=40, do_sample=False, return_dict_in_generate=True)
    found = on_gpu.generate(ids.cuda(), max_new_tokens=40, do_sample=False, return_dict_in_generate=True)
    assert torch.equal(found.sequences.cpu(), expected.sequences)
    for layer in range(2):
        positions = found.past_key_values.positions(layer).cpu()
        assert torch.equal(positions, expected.past_key_values.positions(layer))
