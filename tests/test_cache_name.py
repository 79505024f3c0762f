"""A cache goes in under both names that releases of transformers have for it."""

import copy
import warnings

import pytest
import torch
from models import compiled_model, token_ids

from kvpass.errors import InputError
from kvpass.runtime.cache_name import CACHE


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_either_name(name: str) -> None:
    model = compiled_model("llama", "knorm", ratio=0.5)
    ids, question = token_ids(1, 40), token_ids(1, 5, seed=1)
    held = getattr(model.prefill(ids), CACHE)
    whole = torch.cat([ids, question], dim=1)
    expected = model.generate(whole, max_new_tokens=6, do_sample=False, **{CACHE: copy.deepcopy(held)})
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # of names that will be removed
        found = model.generate(whole, max_new_tokens=6, do_sample=False, **{name: copy.deepcopy(held)})
    assert torch.equal(found, expected)
    logits = model(input_ids=question, **{name: held}).logits
    assert logits is not None and int(logits[0, -1].argmax()) == int(expected[0, 45])
    assert held.seen_tokens == 45


def test_both_names() -> None:
    model = compiled_model("llama", "knorm", ratio=0.5)
    held = getattr(model.prefill(token_ids(1, 40)), CACHE)
    both = {"past_key_values": held, "cache": held}
    with pytest.raises(InputError, match="two names of one argument"):
        model(input_ids=token_ids(1, 5), **both)
    with pytest.raises(InputError, match="two names of one argument"):
        model.generate(token_ids(1, 45), max_new_tokens=2, **both)
