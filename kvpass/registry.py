"""Presses by name: `"snapkv"`, `"chunkkv(snapkv, chunk_length=16)"`, or an object of kvpress."""

import ast
import dataclasses
import difflib
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any, TypeVar

from kvpass.errors import PressError
from kvpass.kvpress_names import from_kvpress, is_kvpress
from kvpass.press import Press

P = TypeVar("P", bound=type[Press])
_REGISTRY: dict[str, type[Press]] = {}


def register_press(name: str) -> Callable[[P], P]:
    """Class decorator: make a press known by name. Raises `PressError` if the name is taken by another class."""

    def register(cls: P) -> P:
        known = _REGISTRY.get(name)
        if known is not None and known.__qualname__ != cls.__qualname__:
            raise PressError(f"the press name {name!r} is taken by {known.__module__}.{known.__qualname__}")
        cls.name = name
        _REGISTRY[name] = cls
        return cls

    return register


def registered_presses() -> Mapping[str, type[Press]]:
    """All presses by name: the library's own, and those of installed packages (entry points `kvpass.presses`)."""
    import kvpass.presses  # registers the library's own  # noqa: F401

    for entry in entry_points(group="kvpass.presses"):
        if entry.name not in _REGISTRY:
            register_press(entry.name)(entry.load())
    return dict(sorted(_REGISTRY.items()))


def press_class(name: str) -> type[Press]:
    """The class of that name. Raises `PressError` with the nearest names if there is none."""
    known = registered_presses()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known are {', '.join(known)}"
        raise PressError(f"there is no press {name!r}; {hint}")
    return known[name]


def resolve_press(press: object) -> tuple[Press | None, float | None]:
    """A press, and the ratio that it brings along if it is an object of kvpress.

    press: a name, a text as `"chunkkv(snapkv, chunk_length=16)"`, a press of kvpass or of kvpress, or None. Raises
    `PressError` if it is something else, an unknown name, or options that the press does not have.
    """
    if press is None or isinstance(press, Press):
        return press, None
    if isinstance(press, str):
        return parse_press(press), None
    if isinstance(press, type):
        raise PressError(f"press={press.__name__} is a class; give an object: {press.__name__}()")
    if is_kvpress(press):
        return from_kvpress(press, press_class)
    raise PressError(f"press is a {type(press).__name__}, expected a name, a kvpass or kvpress press, or None")


def parse_press(text: str) -> Press:
    """`"snapkv"`, `"snapkv(window_size=32)"`, `"chunkkv(snapkv(window_size=32), chunk_length=16)"` as objects."""
    try:
        expression = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise PressError(f"press {text!r} is neither a name nor of the form name(press, option=value)") from error
    press = _value(expression, text)
    if not isinstance(press, Press):
        raise PressError(f"press {text!r} is neither a name nor of the form name(press, option=value)")
    return press


def _value(node: ast.expr, text: str) -> Any:
    if isinstance(node, ast.Name):
        return make_press(press_class(node.id), [], {})
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        given = [_value(arg, text) for arg in node.args]
        named = {keyword.arg: _value(keyword.value, text) for keyword in node.keywords if keyword.arg}
        return make_press(press_class(node.func.id), given, named)
    if isinstance(node, ast.List | ast.Tuple):
        return tuple(_value(element, text) for element in node.elts)
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise PressError(f"press {text!r}: {ast.unparse(node)!r} is no press and no value") from None


def make_press(cls: type[Press], given: list[Any], named: Mapping[str, Any]) -> Press:
    """Construct a press. Raises `PressError` for options that it does not have; `TypeError` for a forbidden nesting."""
    declared = {field.name: field for field in dataclasses.fields(cls)}
    fields = list(declared)
    unknown = [name for name in named if name not in fields]
    if unknown or len(given) > len(fields):
        raise PressError(
            f"{cls.name} has no option {', '.join(map(repr, unknown)) or f'number {len(given)}'}; "
            f"its options are {', '.join(fields) or 'none'}"
        )
    missing = [
        name
        for name, field in list(declared.items())[len(given) :]
        if field.init and name not in named and field.default is field.default_factory
    ]
    if missing:
        raise PressError(f"{cls.name} needs {' and '.join(missing)}, e.g. {cls.name}({_example(missing)})")
    return cls(*given, **named)


def press_text(press: Press) -> str:
    """The text that `parse_press` turns into this press.

    Raises `PressError` if an option has no such text, or the class is not registered.
    """
    text = _text(press)
    if parse_press(text) != press:
        raise PressError(f"{press.name} cannot be written as text: {text} is another press")
    return text


def _text(value: object) -> str:
    if isinstance(value, Press):
        known, kind = registered_presses().get(getattr(value, "name", "")), type(value).__qualname__
        if known is None or known.__qualname__ != kind:
            raise PressError(f'{kind} has no name for files; write @kvpass.register_press("...") above the class')
        options = [
            f"{field.name}={_text(getattr(value, field.name))}" for field in dataclasses.fields(value) if field.init
        ]
        return f"{value.name}({', '.join(options)})"
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_text, value))}]"
    return repr(value)


def _example(missing: list[str]) -> str:
    shown = {"press": "snapkv", "presses": "[snapkv, think]", "ratios": "ratios=[0.3, 0.7]"}
    return ", ".join(shown.get(name, f"{name}=...") for name in missing)
