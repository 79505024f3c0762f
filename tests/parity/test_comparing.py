"""The comparison itself: it must see a wrong selection, and let pass what rounding decided."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from comparing import as_mask, assert_close, compare_kept
from reference import FILES, reference


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
