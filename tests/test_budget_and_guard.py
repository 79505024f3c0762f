"""Two pure functions: how many pairs stay, and which phase graph runs."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpass.budget import Budget, kept_count
from kvpass.ir.form import Phase
from kvpass.runtime.guard import choose_phase

RATIOS = st.floats(min_value=0, max_value=1, exclude_max=True)
TOKENS = st.integers(min_value=1, max_value=2**20)


@pytest.mark.parametrize(
    ("tokens", "ratio", "kept"),
    [
        # Double precision in the reference's order: 1 - ratio first, then times tokens, then truncation.
        (100, 0.9, 9),
        (10, 0.8, 1),
        (1000, 0.1, 900),
        (10, 0.7, 3),
        (64, 0.3, 44),
        (100, 0.5, 50),
        (101, 0.5, 50),
        (3, 0.5, 1),
        (1, 0.5, 1),
        (1, 0.0, 1),
        (7, 0.0, 7),
        (5, 0.99, 1),  # never nothing
        (2, 0.999999, 1),
        (1_000_000, 0.999999, 1),
        (131072, 0.75, 32768),
    ],
)
def test_kept_count_is_the_reference_count(tokens: int, ratio: float, kept: int) -> None:
    assert kept_count(tokens, ratio) == kept
    assert Budget(ratio).count(tokens) == kept


@settings(deadline=None)
@given(TOKENS, RATIOS)
def test_at_least_one_and_at_most_all_are_kept(tokens: int, ratio: float) -> None:
    assert 1 <= kept_count(tokens, ratio) <= tokens
    assert isinstance(kept_count(tokens, ratio), int)


@settings(deadline=None)
@given(TOKENS, RATIOS, RATIOS)
def test_a_greater_ratio_keeps_no_more(tokens: int, one: float, other: float) -> None:
    assert kept_count(tokens, max(one, other)) <= kept_count(tokens, min(one, other))


@settings(deadline=None)
@given(TOKENS, TOKENS, RATIOS)
def test_a_longer_prompt_keeps_no_less(one: int, other: int, ratio: float) -> None:
    assert kept_count(min(one, other), ratio) <= kept_count(max(one, other), ratio)


@settings(deadline=None)
@given(TOKENS, RATIOS)
def test_the_share_is_right_to_one_pair(tokens: int, ratio: float) -> None:
    """Truncation loses less than one pair, rounding in double precision included."""
    kept = kept_count(tokens, ratio)
    assert kept == 1 or -1e-6 <= tokens * (1 - ratio) - kept < 1


@settings(deadline=None)
@given(TOKENS, TOKENS)
def test_a_target_size_is_met_by_all_longer_prompts(tokens: int, size: int) -> None:
    budget = Budget(target_size=size)
    assert budget.count(tokens) == min(tokens, size)
    assert not budget.keeps_all  # a longer prompt may come


@settings(deadline=None)
@given(TOKENS)
def test_no_budget_and_ratio_zero_keep_all(tokens: int) -> None:
    for budget in (Budget(), Budget(0), Budget(0.0)):
        assert budget.keeps_all
        assert budget.count(tokens) == tokens


def test_budgets_are_values() -> None:
    """Equal if they say the same, and readable."""
    assert Budget(0.5) == Budget(ratio=0.5) != Budget(0.25)
    assert [str(b) for b in (Budget(0.5), Budget(target_size=64), Budget())] == [
        "ratio=0.5",
        "target_size=64",
        "ratio=0.0",
    ]
    assert not Budget(0.5).keeps_all


@pytest.mark.parametrize(
    ("min_tokens", "new", "seen", "phase"),
    [
        (2, 1, 0, Phase.DECODE),  # one token on an empty cache: the graph of one token appends it
        (2, 2, 0, Phase.PREFILL),
        (2, 500, 0, Phase.PREFILL),
        (2, 1, 1, Phase.DECODE),
        (2, 1, 500, Phase.DECODE),
        (2, 2, 1, Phase.EXTEND),
        (2, 500, 500, Phase.EXTEND),
        (65, 64, 0, Phase.EXTEND),  # too short for the press: kept whole
        (65, 65, 0, Phase.PREFILL),
        (65, 1, 0, Phase.DECODE),
        (65, 100, 64, Phase.EXTEND),  # what follows a short prompt is never compressed
        (65, 1, 64, Phase.DECODE),
    ],
)
def test_the_guard(min_tokens: int, new: int, seen: int, phase: Phase) -> None:
    assert choose_phase(new, seen, fits=new >= min_tokens) is phase


@settings(deadline=None)
@given(TOKENS, st.integers(min_value=0, max_value=2**20), st.booleans())
def test_the_guard_compresses_first_prompts_alone(new: int, seen: int, fits: bool) -> None:
    """PREFILL for an empty cache and enough tokens, DECODE for one token, EXTEND for all others; always the same."""
    phase = choose_phase(new, seen, fits=fits)
    assert (phase is Phase.DECODE) == (new == 1)
    assert (phase is Phase.PREFILL) == (seen == 0 and fits and new > 1)
    assert phase is choose_phase(new, seen, fits=fits)
    if seen:
        assert phase is choose_phase(new, seen)  # behind a prompt the press has no say
