"""`layers=` chooses which layers are pressed."""

import pytest
import torch
from models import compiled_model, token_ids

from kvpass.errors import PressError


@pytest.mark.parametrize("layers", [[1], (1,), {1}, lambda layer: layer % 2 == 1])
def test_only_the_chosen_layers_are_pressed(layers: object) -> None:
    """The others keep everything, and the rest of the text goes on over both."""
    model = compiled_model("llama", "knorm", ratio=0.5, layers=layers)
    ids = token_ids(2, 60)
    cache = model.prefill(ids).past_key_values
    assert [cache.kept(layer) for layer in range(2)] == [60, 30]
    everywhere = compiled_model("llama", "knorm", ratio=0.5).prefill(ids).past_key_values
    assert torch.equal(cache.positions(1), everywhere.positions(1))
    assert model(input_ids=token_ids(2, 3), past_key_values=cache).logits.shape == (2, 3, 256)


def test_a_predicate_may_name_windowed_layers_which_are_never_pressed() -> None:
    model = compiled_model("gemma3_text", "knorm", ratio=0.5, layers=lambda layer: layer < 2)
    cache = model.prefill(token_ids(1, 60)).past_key_values
    assert [cache.kept(layer) for layer in range(4)] == [16, 30, 16, 60]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([7], r"layers=\[7\]: the model has layers 0 to 3"),
        ([0, 1], r"layers=\[0\] see a window or a chunk"),
        ([], r"no layer is left to press"),
        (lambda layer: False, "no layer is left to press"),
    ],
)
def test_layers_that_cannot_be_pressed_are_named(layers: object, message: str) -> None:
    with pytest.raises(PressError, match=message):
        compiled_model("gemma3_text", "knorm", ratio=0.5, layers=layers)
