"""Graphs count as the host does, for every length."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpass.budget import Budget, kept_count
from kvpass.deployment.counts import Line, Table, rule
from kvpass.errors import PackageError
from kvpass.prompts import prompts_of
from kvpass.registry import resolve_press

LENGTHS = range(2, 3000)


def counts_of(found: Line | Table) -> list[int]:
    if isinstance(found, Line):
        assert [found(n) for n in (2, 3, 1000, 2999)] == found.of(np.array([2, 3, 1000, 2999])).tolist()
        return found.of(np.array(LENGTHS)).tolist()
    return found.counts[list(LENGTHS)].tolist()


@given(st.integers(0, 999))
def test_ratios(thousandths: int) -> None:
    ratio = thousandths / 1000
    expected = [kept_count(n, ratio) for n in LENGTHS]
    assert counts_of(rule(LENGTHS, expected)) == expected


@given(st.floats(0, 1, exclude_max=True))
def test_any_ratio(ratio: float) -> None:
    expected = [kept_count(n, ratio) for n in LENGTHS]
    assert counts_of(rule(LENGTHS, expected)) == expected


@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.25, 0.4, 0.5, 0.6, 0.75, 0.8, 0.9])
def test_usual_ratios_need_no_table(ratio: float) -> None:
    """0.9 leaves int(n * 0.09999999999999998): one less where n is a multiple of ten.

    Of 0.3 and 0.7 the products round now up, now down.
    """
    assert isinstance(rule(LENGTHS, [kept_count(n, ratio) for n in LENGTHS]), Line)


def test_fixed_numbers() -> None:
    assert rule(LENGTHS, [min(n, 512) for n in LENGTHS]) == Line(1, high=512)
    assert rule(LENGTHS, [7] * len(LENGTHS)) == Line(0, offset=7)
    assert rule(LENGTHS, list(LENGTHS)) == Line(1)
    assert rule(LENGTHS, [n - 3 for n in LENGTHS]) == Line(1, offset=-3)


def test_anything_else_is_a_table() -> None:
    odd = [n // 2 + (n % 7 == 0) for n in LENGTHS]
    found = rule(LENGTHS, odd)
    assert isinstance(found, Table)
    assert counts_of(found) == odd


def test_prompts_of_each_graph() -> None:
    """`lagkv` has another method for short prompts; `snapkv` leaves those alone that are no longer than its window."""
    budget = Budget(0.5)
    (one,) = prompts_of(resolve_press("snapkv(window_size=8)")[0], budget, 2, 300)
    assert one.ranges == [(9, 300)]
    short, long = prompts_of(resolve_press("lagkv")[0], budget, 2, 600)
    assert (short.ranges, long.ranges) == ([(5, 259)], [(260, 600)])
    first, whole, rest = prompts_of(resolve_press("chunk(snapkv(window_size=8), chunk_length=64)")[0], budget, 2, 200)
    assert first.ranges == [(9, 64)]
    assert whole.ranges == [(65, 72), (129, 136), (193, 200)]  # the rest is no longer than the window
    assert rest.ranges == [(73, 128), (137, 192)]


@pytest.mark.parametrize(("press", "why"), [("finch", "question"), ("snapkv", "no prompt of up to 40 tokens")])
def test_presses_that_no_graph_can_hold(press: str, why: str) -> None:
    with pytest.raises(PackageError, match=why):
        prompts_of(resolve_press(press)[0], Budget(0.5), 2, 40)
