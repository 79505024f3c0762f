"""The forms that TensorRT takes compute what torch computes, ties included. Nothing of TensorRT is needed."""

import functools

import pytest
import torch
from models import token_ids
from tiny_models import tiny_model
from torch import Tensor

import kvpass
from kvpass.deployment.export import prefill_program
from kvpass.ir import tensorrt_code as code
from kvpass.prompts import prompts_of


def numbers(*shape: int, distinct: int = 9) -> Tensor:
    """Whole numbers as floats, many of them equal."""
    return torch.randint(0, distinct, shape, generator=torch.Generator().manual_seed(0)).float()


def test_more_candidates_than_a_layer_takes() -> None:
    """And more than there are: what is left over is -inf."""
    values = numbers(2, 3, 5000, distinct=4000)
    expected = values.sort(dim=-1, descending=True).values
    for most in (17, 3840, 3841, 4999):
        found, index = code.top(values, most)
        assert torch.equal(found, expected[..., :most])
        assert torch.equal(values.gather(-1, index), found)
    found, _ = code.top(values[..., :100], 4000)
    assert torch.equal(found[..., :100], values[..., :100].sort(dim=-1, descending=True).values)
    assert found[..., 100:].isneginf().all()


@pytest.mark.parametrize("descending", [False, True])
def test_sorts(descending: bool) -> None:
    values = numbers(2, 3, 31)
    assert torch.equal(
        code.order(values, descending=descending), values.argsort(dim=-1, descending=descending, stable=True)
    )
    assert torch.equal(code.sort(values, descending=descending), values.sort(dim=-1, descending=descending).values)
    assert torch.equal(code.median(values)[..., 0], values.median(dim=-1).values)


def test_places() -> None:
    """Gathers, scatters and writes to a cache."""
    states, index = numbers(2, 3, 20, 4), torch.randint(0, 20, (2, 3, 7))
    assert torch.equal(code.gather_rows(states, index), states.gather(2, index[..., None].expand(-1, -1, -1, 4)))
    assert torch.equal(code.gather_last(states[..., 0], index), states[..., 0].gather(2, index))
    place = torch.stack([torch.randperm(12) for _ in range(6)]).reshape(2, 3, 12).clamp(max=5)
    kept, new = torch.zeros(2, 3, 6), numbers(2, 3, 12)
    found = code.scatter_padded(kept, place, new)
    assert torch.equal(found[..., :5], kept.scatter(2, place, new)[..., :5])  # the last one is written to many times
    row, head = torch.arange(2)[:, None, None], torch.arange(3)[:, None]
    slot, fresh = torch.tensor([[[3, 4]], [[9, 10]]]), numbers(2, 3, 2, 4)
    expected = states.index_put((row, head, slot), fresh)
    assert torch.equal(code.put(states, fresh, (row, head, slot)), expected)


def test_variance() -> None:
    values = torch.randn(2, 3, 31)
    for axes, correction, keepdim in (([2], 1, False), ([1, 2], 0, True)):
        expected = values.var(dim=axes, correction=correction, keepdim=keepdim)
        torch.testing.assert_close(code.variance(values, axes, correction, keepdim), expected)


@functools.cache
def one_layer() -> kvpass.CapturedModel:
    return kvpass.capture_model(tiny_model("llama", num_hidden_layers=1))


@pytest.mark.parametrize("press", ["lagkv(lag_size=8)", "random", "entropy_gated_chunkkv(knorm)"])
def test_a_prompt(press: str) -> None:
    """A lowered graph, run by torch, keeps what the graph before it keeps; at a length that is not the example's."""
    model = kvpass.compile(one_layer(), press, 0.5, backend="eager")
    longest = prompts_of(model._recipe.press, model._recipe.budget, 1, 200)[-1]
    program = prefill_program(model, "tensorrt", longest, 1, 200).module()
    for tokens in (53, 149):
        found, cache = program(token_ids(1, tokens)), model.prefill(token_ids(1, tokens)).past_key_values
        assert torch.equal(found["kept_0"], cache.positions(0))
