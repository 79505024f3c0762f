"""What the sweep's tests share."""

import pytest
import transformers

from kvpass.inspection.architectures import architectures

from .check import Outcome, Result, check


def assert_equal(name: str, press: str) -> Result:
    """Fail unless an architecture compiles without a press and with this one, and says what the oracle says.

    With two layers, because capturing takes most of the time.
    """
    rows, _ = architectures()
    if name not in rows:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    result = check(rows[name].shallow(), ["none", press])
    told = [f"{name} / {p}: {v.outcome.value} {v.reason}\n{v.detail}" for p, v in result.verdicts.items()]
    assert result.outcome is Outcome.EQUAL, "\n".join(told)
    return result
