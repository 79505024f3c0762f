"""Every press on a padded batch."""

from typing import Any

import pytest
from catalogue import press_by_name
from models import captured_model, token_ids
from padding import close, entries, padded, texts

import kvpass
from kvpass.registry import registered_presses


@pytest.mark.parametrize("name", sorted(registered_presses()))
def test_every_row_of_every_press_is_as_if_alone(name: str) -> None:
    """Kept sets, entries, and the logits of a question of other lengths and of two tokens behind it."""
    captured = captured_model("llama")
    press = press_by_name(name, captured.graphs.located.layer_count)
    model = kvpass.compile(captured, press, 0.5 if press.needs_budget else None, backend="eager")
    asked: dict[str, Any] = {"question_tokens": 8} if press.needs_question else {}
    rows, questions, more = texts(), texts((3, 6, 1, 5), seed=50), token_ids(4, 2, seed=99)
    ids, mask = padded(rows, "left")
    out = model.prefill(ids, mask, **asked)
    cache = out.past_key_values
    alone = [model.prefill(row[None], **asked) for row in rows]
    for row, single in enumerate(alone):
        close(out.logits[row], single.logits[0])
        for layer in range(len(cache)):
            for found, expected in zip(
                entries(cache, layer, row), entries(single.past_key_values, layer, 0), strict=True
            ):
                close(found, expected)
    ids, mask = padded(questions, "left")
    logits = [model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits]
    logits += [model(input_ids=more[:, i : i + 1], past_key_values=cache).logits for i in range(2)]
    for row, single in enumerate(alone):
        own = single.past_key_values
        expected = model(input_ids=questions[row][None], past_key_values=own).logits
        close(logits[0][row, -len(questions[row]) :], expected[0])
        for i in range(2):
            close(logits[1 + i][row], model(input_ids=more[row : row + 1, i : i + 1], past_key_values=own).logits[0])
