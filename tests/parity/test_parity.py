"""kvpass against kvpress: the same entries kept, the same numbers afterwards.

The reference side of every comparison was written by ``generate.py`` and is checked in; kvpress
is not needed here. What is compared, from exact to tolerant:

* the number of entries kept, exactly;
* which entries are kept, exactly, except where the reference itself decided by rounding: an
  entry may differ only if its reference score lies within a tolerance of the selection threshold;
* keys and values of every kept entry, against the uncompressed cache at the same position;
* logits of the prefill, and of a question asked over the compressed cache.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import tiny_model, weights_checksum

import kvpass
from kvpass import presses

logger = logging.getLogger(__name__)

FILES = sorted((Path(__file__).resolve().parent / "fixtures").glob("*.safetensors"))

PRESSES: dict[str, Callable[..., Any]] = {
    "random": presses.Random,
    "knorm": presses.Knorm,
    "streaming_llm": presses.StreamingLLM,
    "snapkv": presses.SnapKV,
    "tova": presses.TOVA,
    "expected_attention": presses.ExpectedAttention,
}


@dataclass(frozen=True)
class Tolerance:
    """How far kvpass may be from the reference in one dtype.

    ties
        Distance of a reference score from the selection threshold, relative to the threshold,
        below which the reference's choice counts as rounding.
    ties_after_rounding
        The same for a layer whose keys already differ from the reference's by rounding, because
        another attention kernel computed the layer below.
    strays
        Share of the entries of a row that may differ at all, ties or not, besides one.
    entries
        Absolute difference of keys and values.
    logits
        Absolute difference of logits; their standard deviation is about 1.6.
    """

    ties: float
    ties_after_rounding: float
    strays: float
    entries: float
    logits: float


TOLERANCES = {
    "float32": Tolerance(ties=1e-5, ties_after_rounding=1e-5, strays=1.0, entries=1e-5, logits=1e-4),
    # bfloat16 has 8 significant bits. kvpress forms attention logits in it: between 4 and 8 they
    # are 2^-5 apart, and one step in a logit moves its probability by as much (measured, for other
    # orders of operations and for scores in float32: 1.7 %). Once keys differ, every logit does,
    # and up to 16 their steps are 2^-4; two of those are 2^-3 (measured, with eager attention:
    # 8 %). That alone might let a wrong method pass; strays does not (measured: one of nine
    # entries). Keys and values up to 6 then differ by 0.16, logits by 0.12.
    "bfloat16": Tolerance(ties=2**-5, ties_after_rounding=2**-3, strays=0.1, entries=0.25, logits=0.25),
}


@dataclass(frozen=True)
class Reference:
    """One fixture file."""

    metadata: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    @property
    def tolerance(self) -> Tolerance:
        """The bounds that the file's dtype allows."""
        return TOLERANCES[self.metadata["dtype"]]

    @property
    def model_key(self) -> tuple[str, str, int]:
        """Architecture, dtype and seed: what makes the model."""
        return self.metadata["arch"], self.metadata["dtype"], self.metadata["seed"]

    def cases(self, label: str) -> list[dict[str, Any]]:
        """Return the cases of one press and parameter set, one for each ratio."""
        return [case for case in self.metadata["cases"] if case["label"] == label]

    def kept(self, case: dict[str, Any], layer: int) -> torch.Tensor:
        """Return the positions that kvpress kept, [B, Hkv, N], ascending."""
        return self.tensors[f"kept.{case['name']}.{layer}"].long()

    def scores(self, case: dict[str, Any], layer: int) -> torch.Tensor:
        """Return the scores that kvpress selected by, [B, Hkv, S]."""
        return self.tensors[f"{case['scores']}.{layer}"]

    def full(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the uncompressed keys and values."""
        return self.tensors[f"full_keys.{layer}"], self.tensors[f"full_values.{layer}"]


@functools.cache
def metadata(path: Path) -> dict[str, Any]:
    """Metadata of a fixture, without its tensors (test collection needs no more)."""
    with safe_open(path, framework="pt") as file:
        parsed: dict[str, Any] = json.loads(file.metadata()["parity"])
    return parsed


@functools.cache
def reference(path: Path) -> Reference:
    """Load a fixture."""
    return Reference(metadata(path), load_file(path))


@functools.cache
def model_of(key: tuple[str, str, int]) -> Any:
    """Rebuild the model of a fixture; ``key`` is :attr:`Reference.model_key`."""
    arch, dtype, seed = key
    return tiny_model(arch, seed=seed, dtype=getattr(torch, dtype))


@functools.cache
def captured(key: tuple[str, str, int]) -> Any:
    """Capture once for all presses on a model."""
    return kvpass.capture_model(model_of(key))


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


def as_mask(positions: torch.Tensor, length: int) -> torch.Tensor:
    """Turn positions [B, Hkv, N] into a mask [B, Hkv, length]."""
    mask = torch.zeros(*positions.shape[:2], length, dtype=torch.bool)
    return mask.scatter_(2, positions, value=True)


@dataclass(frozen=True)
class Selection:
    """What the reference selected in one layer, and how clearly."""

    is_kept: torch.Tensor  # [B, Hkv, S]
    weakest_kept: torch.Tensor  # [B, Hkv, 1]: the selection threshold
    strongest_dropped: torch.Tensor  # [B, Hkv, 1]

    @classmethod
    def of(cls, kept: torch.Tensor, scores: torch.Tensor) -> Selection:
        """Divide ``scores`` [B, Hkv, S] by the kept positions [B, Hkv, N]."""
        is_kept = as_mask(kept, scores.shape[-1])
        weakest = scores.masked_fill(~is_kept, float("inf")).amin(-1, keepdim=True)
        strongest = scores.masked_fill(is_kept, float("-inf")).amax(-1, keepdim=True)
        return cls(is_kept, weakest, strongest)

    def decided(self, ties: float) -> bool:
        """Whether no row can differ by rounding."""
        gap = self.weakest_kept - self.strongest_dropped
        return bool((gap > ties * self.weakest_kept.abs()).all())


def compare_kept(ours: torch.Tensor, kept: torch.Tensor, scores: torch.Tensor, ties: float, strays: float = 1.0) -> int:
    """Fail unless ``ours`` is the reference's selection outside ties; count rows that differ.

    ``ours`` and ``kept`` are positions [B, Hkv, N], ``scores`` the reference's [B, Hkv, S].
    """
    check_positions(ours, kept.shape, scores.shape[-1])
    selection = Selection.of(kept, scores)
    is_ours = as_mask(ours, scores.shape[-1])
    extra, missing = is_ours & ~selection.is_kept, selection.is_kept & ~is_ours
    margin = ties * selection.weakest_kept.abs()
    wrong = extra & (scores < selection.weakest_kept - margin)
    wrong |= missing & (scores > selection.strongest_dropped + margin)
    # Equal scores (of an observation window that does not fit, say) say nothing about any entry.
    exact_tie = selection.weakest_kept == selection.strongest_dropped
    too_many = missing.sum(-1, keepdim=True) > 1 + int(strays * kept.shape[-1])
    wrong |= too_many & ~exact_tie & (extra | missing)
    if bool(wrong.any()):
        row = tuple(wrong.any(-1).nonzero()[0].tolist())
        lines = [f"{int(wrong.any(-1).sum())} of {wrong[..., 0].numel()} rows differ; first {row}:"]
        for name, mask in (("extra", extra[row]), ("missing", missing[row])):
            positions = mask.nonzero().flatten().tolist()
            lines.append(f"{name} positions {positions}, scores {scores[row][mask].tolist()}")
        lines.append(f"weakest kept score {selection.weakest_kept[row].item()}")
        lines.append(f"strongest dropped score {selection.strongest_dropped[row].item()}")
        raise AssertionError("\n".join(lines))
    return int(missing.any(-1).sum())


def check_positions(positions: torch.Tensor, shape: torch.Size, length: int) -> None:
    """Fail unless ``positions`` has this shape and holds ascending positions below ``length``."""
    assert positions.shape == shape, f"kept {tuple(positions.shape)}, reference {tuple(shape)}"
    assert bool((positions.diff(dim=-1) > 0).all()), "positions are not ascending"
    assert int(positions.min()) >= 0, "a position is negative"
    assert int(positions.max()) < length, "a position lies behind the context"


def assert_close(ours: torch.Tensor, expected: torch.Tensor, atol: float, what: str) -> None:
    """Compare by absolute difference."""
    assert ours.shape == expected.shape, f"{what}: {tuple(ours.shape)}, not {tuple(expected.shape)}"
    assert ours.dtype == expected.dtype, f"{what}: {ours.dtype}, not {expected.dtype}"
    difference = (ours.float() - expected.float()).abs().max().item()
    assert difference <= atol, f"{what}: off by {difference:.2e}, allowed {atol:.0e}"


def rows_at(full: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Gather rows of [B, Hkv, S, D] at positions [B, Hkv, N]."""
    return full.gather(2, positions[..., None].expand(-1, -1, -1, full.shape[-1]))


def compare_entries(ref: Reference, cache: Any, layer: int) -> bool:
    """Compare cached keys and values with the full ones; return whether the keys are bit-equal."""
    positions = cache.positions(layer).long()
    full_keys, full_values = (rows_at(full, positions) for full in ref.full(layer))
    keys, values = cache.keys(layer), cache.values(layer)
    assert_close(keys, full_keys, ref.tolerance.entries, f"keys of layer {layer}")
    assert_close(values, full_values, ref.tolerance.entries, f"values of layer {layer}")
    return torch.equal(keys, full_keys)


def compare_unpressed(ref: Reference, cache: Any, layer: int, reach: int) -> None:
    """Fail unless an unpressed layer holds the last ``reach`` positions, whatever the press."""
    compare_entries(ref, cache, layer)
    length = ref.tensors["input_ids"].shape[1]
    is_cached = as_mask(cache.positions(layer).long(), length)
    assert bool(is_cached[..., -reach:].all()), f"layer {layer} lost an entry inside its window"


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
        pytest.param(path, label, id=f"{path.stem}-{label}")
        for path in FILES
        for label in dict.fromkeys(case["label"] for case in metadata(path)["cases"])
    ]


each_file = pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])


@each_file
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


def some_selection() -> tuple[torch.Tensor, torch.Tensor]:
    """Kept positions and scores of a real case without ties."""
    ref = next(reference(path) for path in FILES if path.stem == "llama-float32-s203")
    (case,) = (case for case in ref.cases("snapkv") if case["ratio"] == 0.5)
    return ref.kept(case, 1), ref.scores(case, 1)


def exchanged(kept: torch.Tensor, scores: torch.Tensor, rank: int) -> torch.Tensor:
    """Exchange the weakest kept entry of one row for the ``rank``-th strongest dropped one."""
    order = scores[0, 1].argsort(descending=True)
    count = kept.shape[-1]
    changed = kept.clone()
    changed[0, 1, changed[0, 1] == order[count - 1]] = order[count + rank]
    return changed.sort(-1).values


def test_comparison_accepts_the_reference() -> None:
    kept, scores = some_selection()
    assert compare_kept(kept, kept, scores, ties=1e-5) == 0


@pytest.mark.parametrize("rank", [0, 1, 20])
def test_comparison_rejects_one_other_entry(rank: int) -> None:
    kept, scores = some_selection()
    with pytest.raises(AssertionError, match=r"1 of 2 rows differ; first \(0, 1\)"):
        compare_kept(exchanged(kept, scores, rank), kept, scores, ties=1e-5)


def test_comparison_accepts_an_exchange_inside_a_tie() -> None:
    kept, scores = some_selection()
    changed = exchanged(kept, scores, rank=0)
    order = scores[0, 1].argsort(descending=True)
    tied = scores.clone()
    tied[0, 1, order[kept.shape[-1]]] = scores[0, 1, order[kept.shape[-1] - 1]] * (1 - 5e-6)
    assert compare_kept(changed, kept, tied, ties=1e-5) == 1


def test_comparison_rejects_many_near_ties() -> None:
    kept, scores = some_selection()
    near = torch.ones_like(scores) + 1e-3 * as_mask(kept, scores.shape[-1])
    other = (~as_mask(kept, scores.shape[-1])).nonzero()[:, 2].view(1, 2, -1)
    changed = torch.cat([kept[..., :50], other[..., :51]], -1).sort(-1).values
    with pytest.raises(AssertionError, match="2 of 2 rows differ"):
        compare_kept(changed, kept, near, ties=0.125, strays=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda kept: kept[..., 1:], "kept"),
        (lambda kept: kept.flip(-1), "ascending"),
        (lambda kept: kept + 1, "behind the context"),
        (lambda kept: kept - kept.max(), "negative"),
    ],
    ids=["too few", "descending", "too far", "negative"],
)
def test_comparison_rejects_malformed_positions(change: Callable[[torch.Tensor], torch.Tensor], message: str) -> None:
    kept, scores = some_selection()
    with pytest.raises(AssertionError, match=message):
        compare_kept(change(kept), kept, scores, ties=1e-5)


def test_comparison_rejects_other_numbers() -> None:
    ours = torch.zeros(1, 5, 8)
    other = ours.clone()
    other[0, 4, 7] = 2e-4
    with pytest.raises(AssertionError, match=r"logits: off by 2\.00e-04"):
        assert_close(other, ours, 1e-4, "logits")
