"""What may be done with a cache: going back, other rows, copies."""

import copy
from typing import Any

import pytest
import torch
from caches import HALF, append, close, content, same
from models import compiled_model, token_ids

from kvpass.errors import CacheError
from kvpass.presses import ExpectedAttention

# -- going back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, HALF], ids=["whole", "pressed"])
def test_rewind_forgets_all_but_the_context(options: dict[str, Any]) -> None:
    model, question = compiled_model("llama", **options), token_ids(2, 9, seed=1)
    cache = model.prefill(token_ids(2, 40)).past_key_values
    context = content(cache)
    expected = append(model, cache, question)
    append(model, cache, token_ids(2, 1))
    assert cache.rewind() is cache
    assert cache.seen_tokens == 40
    assert same(content(cache), context)
    assert torch.equal(append(model, cache, question), expected)


def test_rewind_of_a_prompt_that_was_too_short_to_compress() -> None:
    """The first prompt is the context, compressed or not."""
    model = compiled_model("llama", **HALF)
    for tokens in (1, 3):
        cache = model.prefill(token_ids(1, tokens)).past_key_values
        append(model, cache, token_ids(1, 9, seed=1))
        assert (cache.rewind().seen_tokens, cache.kept(0)) == (tokens, tokens)


@pytest.mark.parametrize("options", [{}, HALF], ids=["whole", "pressed"])
@pytest.mark.parametrize("length", [43, -6], ids=["length", "negative"])
def test_crop_behind_the_context(options: dict[str, Any], length: int) -> None:
    """Drops the last 6 of 49 tokens, as if they had never been read."""
    model, ids = compiled_model("llama", **options), token_ids(2, 60)
    cache = model.prefill(ids[:, :40]).past_key_values
    append(model, cache, ids[:, 40:43])
    expected = cache.copy()
    append(model, cache, ids[:, 43:49])
    cache.crop(length)
    assert cache.seen_tokens == 43
    assert same(content(cache), content(expected))
    other = token_ids(2, 5, seed=1)
    assert torch.equal(append(model, cache, other), append(model, expected, other))


def test_crop_leaves_alone_what_is_shorter_already() -> None:
    """So does crop(0), which removes no token: that is how transformers counts."""
    model = compiled_model("llama", **HALF)
    cache = model.prefill(token_ids(1, 40)).past_key_values
    before = content(cache)
    for length in (40, 41, 1000, 0):
        cache.crop(length)
    assert cache.seen_tokens == 40 and same(content(cache), before)


def test_crop_inside_an_uncompressed_context() -> None:
    """Equals a prompt of that length; rewind() cannot bring back what was cropped; it may be emptied."""
    model, ids = compiled_model("llama"), token_ids(2, 60)
    cache, shorter = (model.prefill(ids[:, :length]).past_key_values for length in (40, 25))
    cache.crop(25)
    for found, expected in zip(content(cache), content(shorter), strict=True):
        close(found, expected)
    close(append(model, cache, ids[:, 25:50]), append(model, shorter, ids[:, 25:50]))
    assert cache.rewind().seen_tokens == 25
    cache.crop(-25)
    assert (cache.seen_tokens, cache.kept(0)) == (0, 0)
    close(append(model, cache, ids[:, :30]), model.prefill(ids[:, :30]).logits)


@pytest.mark.parametrize("length", [39, 20, -10, -49])
def test_crop_inside_a_compressed_context_is_refused(length: int) -> None:
    """The message says what to do, and the cache stays as it was."""
    model = compiled_model("llama", **HALF)
    cache = model.prefill(token_ids(1, 40)).past_key_values
    append(model, cache, token_ids(1, 9, seed=1))
    before = content(cache)
    with pytest.raises(CacheError, match="context of 40 tokens is compressed; prefill the shorter text instead"):
        cache.crop(length)
    assert cache.seen_tokens == 49 and same(content(cache), before)


@pytest.mark.parametrize("options", [{}, HALF], ids=["whole", "pressed"])
def test_crop_by_more_than_there_is(options: dict[str, Any]) -> None:
    """The message says how many tokens there are; nothing was changed."""
    cache = compiled_model("llama", **options).prefill(token_ids(1, 20)).past_key_values
    before = content(cache)
    with pytest.raises(CacheError, match="21 tokens, the cache has seen 20") as caught:
        cache.crop(-21)
    assert "compressed" not in str(caught.value)
    assert cache.seen_tokens == 20 and same(content(cache), before)


def test_reset_empties() -> None:
    """A cache that was reset takes another prompt, of another batch size."""
    model = compiled_model("llama", **HALF)
    cache = model.prefill(token_ids(2, 40)).past_key_values
    cache.reset()
    assert (cache.seen_tokens, cache.batch_size, cache.nbytes) == (0, None, 0)
    ids = token_ids(3, 30)
    assert torch.equal(append(model, cache, ids), model.prefill(ids).logits)
    assert cache.kept(0) == 15


# -- rows and copies -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"press": ExpectedAttention(), "ratio": 0.6}], ids=["whole", "pressed"])
def test_rows_can_be_reordered(options: dict[str, Any]) -> None:
    """Content, positions and continuation follow; rows may double and vanish."""
    model, question = compiled_model("llama", **options), token_ids(3, 5, seed=1)
    cache = model.prefill(token_ids(3, 50)).past_key_values
    order = torch.tensor([2, 0, 2])
    expected = [tensor[order] for tensor in content(cache)]
    logits = append(model, cache.copy(), question)
    cache.reorder_cache(order)
    assert same(content(cache), expected)
    close(append(model, cache, question[order]), logits[order])
    cache.batch_select_indices(torch.tensor([1]))
    assert cache.batch_size == 1
    assert cache.positions(0).shape[0] == cache.keys(0).shape[0] == 1


def test_rows_can_be_repeated() -> None:
    """One compressed context, three questions in one batch."""
    model = compiled_model("llama", ExpectedAttention(), ratio=0.6)
    cache = model.prefill(token_ids(2, 50)).past_key_values
    before, questions = content(cache), token_ids(6, 5, seed=1)
    alone = [append(model, cache.copy(), questions[[i, 3 + i]]) for i in range(3)]
    cache.batch_repeat_interleave(3)
    assert cache.batch_size == 6 and cache.seen_tokens == 50
    assert same(content(cache), [tensor.repeat_interleave(3, dim=0) for tensor in before])
    together = append(model, cache, questions)
    for i in range(3):
        close(together[[i, 3 + i]], alone[i])


@pytest.mark.parametrize("how", ["copy", "deepcopy"])
def test_copies_are_independent(how: str) -> None:
    """Whatever happens to one of them, the other does not notice."""
    model = compiled_model("llama", **HALF)
    cache = model.prefill(token_ids(2, 40)).past_key_values
    append(model, cache, token_ids(2, 3))
    twin = cache.copy() if how == "copy" else copy.deepcopy(cache)
    before = content(cache)
    assert same(content(twin), before)
    append(model, twin, token_ids(2, 4, seed=1))
    twin.rewind()
    twin.reorder_cache(torch.tensor([1, 1]))
    twin.keys(0).zero_()
    assert cache.seen_tokens == 43 and same(content(cache), before)
    append(model, cache, token_ids(2, 5, seed=2))
    assert twin.seen_tokens == 40 and twin.kept(0) == 20
