"""Padded batches: every row as if it were alone."""

from typing import Any

import pytest
import torch
from models import compiled_model
from padding import PAD, close, padded, texts

import kvpass
from kvpass.errors import CacheError, InputError


@pytest.mark.parametrize("arch", ["llama", "gemma3_text"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_generate(arch: str, side: str) -> None:
    """Greedy tokens of every row, windows and short rows included, on either side."""
    model = compiled_model(arch, "snapkv(window_size=8)", ratio=0.5)
    rows = texts((70, 5, 41, 1, 90))  # two of them too short for the press
    ids, mask = padded(rows, side)
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": PAD, "eos_token_id": None}
    found = model.generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :]
    for row, tokens in enumerate(rows):
        expected = model.generate(tokens[None], attention_mask=torch.ones(1, len(tokens)), **options)
        assert found[row].tolist() == expected[0, len(tokens) :].tolist()


def test_beams_and_a_second_turn() -> None:
    model = compiled_model("llama", "knorm", ratio=0.5)
    rows = texts((50, 33))
    ids, mask = padded(rows, "left")
    options = {"max_new_tokens": 6, "pad_token_id": PAD, "eos_token_id": None, "num_beams": 3, "do_sample": False}
    found = model.generate(ids, attention_mask=mask, **options)[:, 50:]
    for row, tokens in enumerate(rows):
        expected = model.generate(tokens[None], attention_mask=torch.ones(1, len(tokens)), **options)
        assert found[row].tolist() == expected[0, len(tokens) :].tolist()
    options |= {"num_beams": 1, "return_dict_in_generate": True}
    first = model.generate(ids, attention_mask=mask, **options)
    more, more_mask = padded(texts((4, 7), seed=9), "left")
    text = torch.cat([first.sequences, more], dim=1)
    whole_mask = torch.cat([mask, torch.ones(2, 6, dtype=torch.int64), more_mask], dim=1)
    second = model.generate(text, attention_mask=whole_mask, past_key_values=first.past_key_values, **options)
    for row, tokens in enumerate(rows):
        cache = model.prefill(tokens[None]).past_key_values
        behind = torch.cat([first.sequences[row, 50:], more[row][more_mask[row] == 1]])[None]
        logits = model(input_ids=behind, past_key_values=cache).logits[:, -1]
        for token in second.sequences[row, text.shape[1] :].tolist():
            assert int(logits.argmax()) == token
            logits = model(input_ids=torch.tensor([[token]]), past_key_values=cache).logits[:, -1]


def test_rewind_copy_save_and_crop_of_rows_that_differ(tmp_path: Any) -> None:
    model = compiled_model("gemma3_text", "streaming_llm", ratio=0.5)
    ids, mask = padded(texts((70, 33)), "left")
    question, question_mask = padded(texts((4, 7), seed=5), "right")
    cache = model.prefill(ids, mask).past_key_values
    assert (cache.seen_tokens, cache.get_seq_length(), cache.next_positions) == (70, 70, (70, 33))
    expected = model(input_ids=question, attention_mask=question_mask, past_key_values=cache).logits
    assert cache.get_seq_length() == 77 and cache.next_positions == (74, 40)
    with pytest.raises(CacheError, match=r"rows are padded there|moved on"):
        cache.crop(75)
    cache.save(tmp_path / "cache.safetensors")
    caches = [cache.copy().rewind(), kvpass.CompressedCache.load(tmp_path / "cache.safetensors").rewind()]
    cache.crop(70)
    for other in (*caches, cache):
        found = model(input_ids=question, attention_mask=question_mask, past_key_values=other).logits
        assert torch.equal(found, expected)
    swapped = model.prefill(ids, mask).past_key_values
    swapped.batch_select_indices(torch.tensor([1, 0]))
    found = model(input_ids=question[[1, 0]], attention_mask=question_mask[[1, 0]], past_key_values=swapped).logits
    close(found, expected[[1, 0]])


def test_nothing_is_computed_for_padding() -> None:
    """Rows of equal length beside one another share a run of the graph; no graph is given any pad."""
    model = compiled_model("llama", "knorm", ratio=0.5)
    ids, mask = padded(texts(), "left")
    graph, sizes = next(graph for key, graph in model._execution.ready.items() if key[1]), []
    run = graph.run
    try:
        object.__setattr__(graph, "run", lambda *given: sizes.append(tuple(given[0].shape)) or run(*given))
        model.prefill(ids, mask)
    finally:
        object.__setattr__(graph, "run", run)
    assert sizes == [(1, 70), (2, 41), (1, 90)]


def test_a_row_of_nothing_is_refused() -> None:
    ids, mask = padded(texts((9, 5)), "left")
    mask[1] = 0
    with pytest.raises(InputError, match=r"rows \[1\] are nothing but padding"):
        compiled_model("llama").prefill(ids, mask)
    cache = compiled_model("llama").prefill(ids).past_key_values
    with pytest.raises(InputError, match=r"rows \[1\] are nothing but padding"):  # a single token too
        compiled_model("llama")(input_ids=ids[:, :1], attention_mask=torch.tensor([[1], [0]]), past_key_values=cache)
