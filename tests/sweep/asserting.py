"""What the sweep's tests share."""

from .check import Outcome, Result, check
from .configs import architectures


def assert_equal(name: str, press: str) -> Result:
    """Fail unless an architecture compiles without a press and with this one, and says what the oracle says.

    With two layers, because capturing takes most of the time.
    """
    rows, _ = architectures()
    result = check(rows[name].shallow(), ["none", press])
    told = [f"{name} / {p}: {v.outcome.value} {v.reason}\n{v.detail}" for p, v in result.verdicts.items()]
    assert result.outcome is Outcome.EQUAL, "\n".join(told)
    return result
