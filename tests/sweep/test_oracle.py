"""The sweep itself: it covers the mapping, its oracle is the eager model, and it can fail."""

import pytest
import torch
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from kvpass.inspection.architectures import architectures

from . import check as checking
from .check import Mismatch, Outcome, Result, Verdict, check
from .oracle import eager_logits, hidden_from, logits_without
from .table import counts, markdown
from .weights import sweep_model


def test_every_model_type_is_swept_or_left_out_with_a_reason() -> None:
    rows, left_out = architectures()
    swept = {name for name in rows if "+" not in name}
    assert swept | set(left_out) == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert not swept & set(left_out)
    assert all(left_out.values())


def test_hidden_pairs_matter_only_behind_the_prompt() -> None:
    rows, _ = architectures()
    model = sweep_model(rows["qwen3"])
    ids = torch.arange(3, 53)[None]
    hidden = torch.zeros(1, 2, 37, dtype=torch.bool)
    hidden[:, 1, 30] = True  # one pair of one head
    plain, lost = eager_logits(model, ids), logits_without(model, ids, [hidden, None, None, None])
    assert torch.equal(logits_without(model, ids, None)[:, :37], lost[:, :37])
    assert (plain - lost)[:, 37:].abs().amax((0, 2)).min() > checking.TOLERANCE * plain.abs().max()


def test_the_oracle_is_a_cut_dynamic_cache() -> None:
    """Hiding is the same as decoding over a cache of transformers that holds nothing but the kept pairs."""
    rows, _ = architectures()
    model = sweep_model(rows["llama"])
    ids = torch.arange(3, 53)[None]
    kept = torch.stack([torch.arange(0, 37, 2), torch.arange(1, 38, 2).clamp(max=36)])[None]
    with torch.no_grad():
        cache = model(ids[:, :37], use_cache=True).past_key_values
        for layer in cache.layers:
            rows_of = kept[..., None].expand(-1, -1, -1, layer.keys.shape[-1])
            layer.keys, layer.values = layer.keys.gather(2, rows_of), layer.values.gather(2, rows_of)
        said = []
        for step in range(37, 50):
            result = model(ids[:, step : step + 1], position_ids=torch.tensor([[step]]), past_key_values=cache)
            said.append(result.logits)
    expected = logits_without(model, ids, [hidden_from(kept, 37)] * 2)[:, 37:]
    torch.testing.assert_close(torch.cat(said, 1), expected, atol=1e-5, rtol=1e-5)


def test_one_wrongly_hidden_position_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(positions: Tensor, prompt: int) -> Tensor:
        hidden = hidden_from(positions, prompt)
        hidden[0, 0, int(positions[0, 0, -2])] = True  # of one head in one row
        return hidden

    rows, _ = architectures()
    monkeypatch.setattr(checking, "hidden_from", wrong)
    result = check(rows["llama"], ["knorm"])
    assert result.outcome is Outcome.FAILED
    assert "logits off by" in result.verdicts["knorm"].reason
    assert "from question on" in result.verdicts["knorm"].reason


def test_a_comparison_that_shows_nothing_fails() -> None:
    logits = torch.ones(1, 50, 8)
    with pytest.raises(Mismatch, match="nothing was tested"):
        checking._check_effect(logits, logits, 37)


def test_the_table_says_what_happened() -> None:
    good, bad = Verdict(Outcome.EQUAL, worst=2e-6), Verdict(Outcome.REFUSED, "layer 0: no <keys> | values")
    results = [Result("b", "B", 2, "2 causal", {"none": good, "knorm": good}), Result("a", "A")]
    results[1].verdicts = {"none": bad, "knorm": bad}
    text = markdown(results, {"c": "why"}, ["none", "knorm"])
    assert "| b | B | 2 | 2 causal | 2e-06 | 2e-06 |" in text
    assert "| a | A |  |  | refused: layer 0: no &lt;keys> \\| values | refused |" in text
    assert "- why: c" in text
    assert counts(results, {"c": "why"}) == (
        "2 architectures: 1 equal with every press, 0 equal with some presses, 1 refused, 0 failed; "
        "1 model types left out"
    )
