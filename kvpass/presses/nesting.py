"""Which press may stand in which wrapper; asked when the wrapper is constructed."""

from kvpass.errors import NestingError
from kvpass.press import Press, ScorerPress, SelectingPress


def expect_scorer(wrapper: str, press: object, why: str) -> None:
    """Raise `NestingError` unless `press` is a score per pair."""
    expect_press(wrapper, press)
    if not isinstance(press, ScorerPress):
        raise NestingError(f"{wrapper} takes a press that scores pairs, {_name(press)} does not: {why}")


def expect_selecting(wrapper: str, press: object, why: str) -> None:
    """Raise `NestingError` unless `press` keeps some pairs and leaves them as they are."""
    expect_press(wrapper, press)
    if not isinstance(press, SelectingPress):
        raise NestingError(f"{wrapper} takes a press that keeps pairs as they are, {_name(press)} does not: {why}")


def expect_press(wrapper: str, press: object) -> None:
    """Raise `NestingError` unless `press` is one."""
    if isinstance(press, type):
        raise NestingError(f"{wrapper}: {press.__name__} is a class; give an object: {press.__name__}()")
    if not isinstance(press, Press):
        raise NestingError(
            f"{wrapper}: {press!r} is a {type(press).__name__}, expected a press object; in text form write "
            f'"{wrapper}(snapkv)"'
        )


def _name(press: object) -> str:
    return getattr(press, "name", type(press).__name__)
