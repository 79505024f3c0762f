"""kvpass against kvpress: the same entries kept, the same numbers afterwards.

The reference side of every comparison was written by ``generate.py`` and is checked in; kvpress
is not needed here. What is compared, from exact to tolerant:

* the number of entries kept, exactly;
* which entries are kept, exactly, except where the reference itself decided by rounding: an
  entry may differ only if its reference score lies within a tolerance of the selection threshold;
* keys and values of every kept entry, against the uncompressed cache at the same position;
* logits of the prefill, and of a question asked over the compressed cache.

Here the presses of the first release; ``test_more.py`` has the others.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from comparing import (
    Selection,
    assert_close,
    check_positions,
    compare_entries,
    compare_kept,
    compare_unpressed,
)
from reference import FILES, FIXTURES, Reference, captured, marks, metadata, model_of, reference
from tiny_models import weights_checksum

import kvpass
from kvpass import presses

logger = logging.getLogger(__name__)

PRESSES: dict[str, Callable[..., Any]] = {
    "random": presses.Random,
    "knorm": presses.Knorm,
    "streaming_llm": presses.StreamingLLM,
    "snapkv": presses.SnapKV,
    "tova": presses.TOVA,
    "expected_attention": presses.ExpectedAttention,
}


@functools.cache
def compiled_with(key: tuple[str, str, int], press: str, kwargs: str) -> Any:
    """Compile once for all contexts and ratios that share a model and a press."""
    press_object = PRESSES[press](**json.loads(kwargs))
    return kvpass.compile(captured(key), press=press_object, ratio=0.5, backend="eager")


def compiled(key: tuple[str, str, int], press: str, kwargs: str, ratio: float) -> Any:
    """The compiled model, set to a ratio."""
    if ratio == 0.0:
        return kvpass.compile(captured(key), press=PRESSES[press](), ratio=0.0, backend="eager")
    model = compiled_with(key, press, kwargs)
    model.set_budget(ratio=ratio)
    return model


def compare_case(ref: Reference, case: dict[str, Any]) -> tuple[int, bool]:
    """Compare one press at one ratio.

    Returns how many rows keep other entries than the reference (by rounding; anything else
    fails), and whether the question's logits could be compared: only where no row differs.
    """
    model = compiled(ref.model_key, case["press"], json.dumps(case["kwargs"]), case["ratio"])
    out = model.prefill(ref.tensors["input_ids"])
    tolerance = ref.tolerance
    logits = ref.tensors["prefill_logits"][:, None]
    assert_close(out.logits, logits, tolerance.logits, "prefill logits")
    cache = out.past_key_values
    length = ref.tensors["input_ids"].shape[1]
    differing = 0
    for layer in range(ref.metadata["num_layers"]):
        if layer not in ref.metadata["pressed_layers"]:
            window = model_of(ref.model_key).config.sliding_window
            compare_unpressed(ref, cache, layer, window - 1)
            continue
        positions, kept = cache.positions(layer).long(), ref.kept(case, layer)
        check_positions(positions, kept.shape, length)
        same_keys = compare_entries(ref, cache, layer)
        if case["press"] == "random":
            continue  # kvpress draws other numbers: only the count is comparable
        ties = tolerance.ties if same_keys else tolerance.ties_after_rounding
        scores = ref.scores(case, layer)
        differing += compare_kept(positions, kept, scores, ties, tolerance.strays)
    if differing or case["press"] == "random":
        return differing, False
    logits = model(input_ids=ref.tensors["question_ids"], past_key_values=cache).logits
    expected = ref.tensors[f"question_logits.{case['name']}"]
    assert_close(logits, expected, tolerance.logits, "question logits")
    return 0, True


def labels() -> list[Any]:
    """All (file, label) pairs, as pytest parameters."""
    return [
        pytest.param(path, label, id=f"{path.stem}-{label}", marks=marks(path))
        for path in FILES
        for label in dict.fromkeys(case["label"] for case in metadata(path)["cases"])
    ]


each_file = pytest.mark.parametrize("path", [pytest.param(path, id=path.stem, marks=marks(path)) for path in FILES])


@pytest.mark.parametrize("path", FIXTURES, ids=[path.stem for path in FIXTURES])
def test_model_is_the_fixture_model(path: Path) -> None:
    ref = reference(path)
    assert weights_checksum(model_of(ref.model_key)) == ref.metadata["weights"]


@pytest.mark.parametrize(("path", "label"), labels())
def test_matches_kvpress(path: Path, label: str, record_property: Callable[[str, object], None]) -> None:
    ref = reference(path)
    cases = ref.cases(label)
    results = {case["name"]: compare_case(ref, case) for case in cases}
    for name, (differing, _) in results.items():
        record_property(f"differing rows, {name}", differing)
        logger.info("%s, %s: %d rows differ by rounding", path.stem, name, differing)
    # Where the reference decides every row by more than rounding, no row may differ and the logits
    # must have been compared: a test that always finds an excuse is no test.
    for case in cases:
        if case["press"] != "random" and is_decided(ref, case):
            assert results[case["name"]] == (0, True), case["name"]


@each_file
def test_keeps_everything_at_ratio_zero(path: Path) -> None:
    ref = reference(path)
    model = compiled(ref.model_key, "knorm", "{}", 0.0)
    out = model.prefill(ref.tensors["input_ids"])
    for layer in ref.metadata["pressed_layers"]:
        length = ref.tensors["input_ids"].shape[1]
        assert out.past_key_values.positions(layer).shape[-1] == length
        compare_entries(ref, out.past_key_values, layer)
    question = ref.tensors["question_ids"]
    logits = model(input_ids=question, past_key_values=out.past_key_values).logits
    expected = ref.tensors["question_logits.none"]
    assert_close(logits, expected, ref.tolerance.logits, "question logits")


def is_decided(ref: Reference, case: dict[str, Any]) -> bool:
    """Whether rounding cannot move the reference's choice in any layer."""
    return all(
        Selection.of(ref.kept(case, layer), ref.scores(case, layer)).decided(ref.tolerance.ties_after_rounding)
        for layer in ref.metadata["pressed_layers"]
    )


def test_fixtures_decide_nearly_all_cases() -> None:
    """Nearly all float32 cases must be decided, or comparing them would show nothing.

    Not decided by construction: SnapKV where the observation window does not fit into the budget
    (all of it ties), and Knorm where a token occurs twice (in the first layer its keys differ by a
    rotation only).
    """
    files = [reference(path) for path in FILES]
    cases = [
        (ref, case)
        for ref in files
        if ref.metadata["dtype"] == "float32"
        for case in ref.metadata["cases"]
        if case["press"] != "random"
    ]
    undecided = [(ref, case) for ref, case in cases if not is_decided(ref, case)]
    others = [case["name"] for ref, case in undecided if not window_overflows(ref, case)]
    assert len(cases) == 196
    assert len(undecided) <= 0.15 * len(cases)
    assert len(others) <= 6, others


def window_overflows(ref: Reference, case: dict[str, Any]) -> bool:
    """Whether SnapKV's window alone exceeds the number of kept entries."""
    if case["press"] != "snapkv":
        return False
    kept = ref.kept(case, ref.metadata["pressed_layers"][0]).shape[-1]
    return bool(kept < case["kwargs"].get("window_size", 64))
