"""What is measured: the same model, run in different ways through `generate`."""

import copy
import importlib.util
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig

import kvpass
from kvpass.kvpress_names import NAMES
from kvpass.press import Press
from kvpass.registry import parse_press
from kvpass.runtime.cache import CompressedCache
from kvpass.runtime.model import CompiledModel

Generate = Callable[..., Any]


@dataclass(frozen=True)
class Subject:
    """One way to run the model: `generate` takes token ids [B, S] and the options of transformers' `generate`."""

    name: str
    generate: Generate


def subjects(
    model: Any, presses: Sequence[str], ratio: float, backend: str, mode: str | None, only: tuple[str, ...] = ()
) -> dict[str, Callable[[], Subject]]:
    """By name, made when called; kvpress only where it can be imported. `only` are regular expressions of names."""
    table: dict[str, Callable[[], Generate]] = {
        "transformers": lambda: _eager(model),
        "transformers, static, compiled": lambda: _static(model),
    }
    if importlib.util.find_spec("kvpress") is not None:
        for press in presses:
            table[f"kvpress, {press}"] = partial(_kvpress, model, press, ratio, compiled=False)
            table[f"kvpress, {press}, compiled"] = partial(_kvpress, model, press, ratio, compiled=True)
    table["kvpass, no press"] = lambda: _kvpass(model, None, None, backend, mode)
    for press in presses:
        table[f"kvpass, {press}"] = partial(_kvpass, model, press, ratio, backend, mode)
    return {
        name: partial(_subject, name, make)
        for name, make in table.items()
        if not only or any(re.match(pattern, name) for pattern in only)
    }


def _subject(name: str, make: Callable[[], Generate]) -> Subject:
    return Subject(name, make())


def cache_bytes(cache: Any) -> tuple[int, int]:
    """Bytes of the entries that are kept, bytes of the storage that holds them."""
    if isinstance(cache, CompressedCache):
        return cache.used_bytes, cache.nbytes
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values) if isinstance(t, Tensor)]
    return sum(t.nbytes for t in tensors), sum(t.untyped_storage().nbytes() for t in tensors)


def _eager(model: Any) -> Generate:
    generate = model.generate
    return lambda ids, **options: generate(ids, **options)


def _static(model: Any) -> Generate:
    """As transformers compiles: the decode step, over a cache of fixed size; on a CPU it must be asked to."""
    config: Any = CompileConfig(fullgraph=False, mode="default" if model.device.type == "cpu" else "reduce-overhead")
    config._compile_all_devices = True
    generate = model.generate
    return lambda ids, **options: generate(ids, cache_implementation="static", compile_config=config, **options)


def _kvpress(model: Any, press: str, ratio: float, *, compiled: bool) -> Generate:
    import kvpress  # only where it is installed, which needs an old transformers

    made = _of_kvpress(kvpress, parse_press(press), ratio)
    generate = model.generate

    def run(ids: Tensor, **options: Any) -> Any:
        parts = {module: set(module._modules) for module in model.modules()}
        try:
            with _compiled_forward(model) if compiled else nullcontext(), made(model):
                return generate(ids, **options)
        finally:  # it leaves modules behind, which would make another model of this one
            for module, names in parts.items():
                for name in set(module._modules) - names:
                    delattr(module, name)

    return run


@contextmanager
def _compiled_forward(model: Any) -> Iterator[None]:
    if not hasattr(model, "_kvpass_bench_compiled"):
        model._kvpass_bench_compiled = torch.compile(model.forward)
    model.forward = model._kvpass_bench_compiled
    try:
        yield
    finally:
        del model.forward


def _of_kvpress(kvpress: Any, press: Press, ratio: float) -> Any:
    """The press of kvpress with the same fields."""
    classes = {ours: theirs for theirs, ours in NAMES.items()}
    made = getattr(kvpress, classes[press.name])(compression_ratio=ratio)
    for name, value in vars(press).items():
        if hasattr(made, name) and isinstance(value, int | float | bool):
            setattr(made, name, value)
    return made


def _kvpass(model: Any, press: str | None, ratio: float | None, backend: str, mode: str | None) -> Generate:
    compiled: CompiledModel = kvpass.compile(model, press=press, ratio=ratio, backend=backend, mode=mode)
    return lambda ids, **options: compiled.generate(ids, **copy.copy(options))
