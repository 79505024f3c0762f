"""The results as a markdown table."""

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
import transformers

from .check import PROMPTS, QUESTION, RATIO, STEPS, TOLERANCE, Outcome, Result


def counts(results: Sequence[Result], left_out: Mapping[str, str]) -> str:
    """One line."""
    found = Counter(map(_category, results))
    parts = [f"{found[category]} {category}" for category in CATEGORIES]
    return f"{len(results)} architectures: {', '.join(parts)}; {len(left_out)} model types left out"


CATEGORIES = ("equal with every press", "equal with some presses", "refused", "failed")


def _category(result: Result) -> str:
    outcomes = {verdict.outcome for verdict in result.verdicts.values()}
    if Outcome.FAILED in outcomes:
        return "failed"
    if Outcome.REFUSED in outcomes:
        return "equal with some presses" if Outcome.EQUAL in outcomes else "refused"
    return "equal with every press"


def markdown(results: Sequence[Result], left_out: Mapping[str, str], presses: Sequence[str]) -> str:
    """The whole file."""
    lines = [
        "# Every decoder of transformers",
        "",
        f"Made by `python -m tests.sweep` with torch {torch.__version__.split('+')[0]} and transformers "
        f"{transformers.__version__}: tiny random models, prompts of {' and '.join(map(str, PROMPTS))} tokens, half of "
        f"the pairs dropped (ratio {RATIO}), then a question of {QUESTION} tokens and {STEPS} single steps, compared "
        "with the eager model that cannot see the dropped pairs. A number is the greatest difference of logits, "
        f"relative to the greatest logit; up to {TOLERANCE:.0e} counts as equal. Behind a + stands what the config "
        "varies.",
        "",
        f"{counts(results, left_out)}.",
        "",
        f"| architecture | class | sites | masks | {' | '.join(presses)} |",
        f"|---|---|---:|---|{'---|' * len(presses)}",
    ]
    for result in sorted(results, key=lambda result: result.name):
        cells = [result.name, result.model_class, str(result.sites or ""), result.masks, *_verdicts(result, presses)]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "## Left out", ""]
    for reason in sorted(set(left_out.values())):
        lines.append(f"- {reason}: {', '.join(name for name, why in left_out.items() if why == reason)}")
    return "\n".join(lines) + "\n"


def _verdicts(result: Result, presses: Sequence[str]) -> list[str]:
    """One cell a press; a reason that all presses share is said once."""
    cells, said = [], ""
    for press in presses:
        verdict = result.verdicts[press]
        if verdict.outcome is Outcome.EQUAL:
            cells.append(f"{verdict.worst:.0e}")
        elif verdict.reason == said:
            cells.append(verdict.outcome.value)
        else:
            said = verdict.reason
            cells.append(f"{verdict.outcome.value}: {_escaped(verdict.reason)}")
    return cells


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
