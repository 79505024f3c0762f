"""Sets that a model loops over, in an order that is the same in every process.

transformers computes a rotation per kind of layer, `for layer_type in set(config.layer_types)`: strings in a set follow
the hash seed of the process, and so would the graph, and every text and snapshot of it.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


class _InOrder(set[Any]):
    """A set whose members come sorted."""

    def __iter__(self) -> Iterator[Any]:
        return iter(sorted(super().__iter__(), key=repr))


@contextmanager
def sets_in_order(model: nn.Module) -> Iterator[None]:
    """Let `set` be one that is sorted in the modules that define the parts of `model`, but for torch's own."""
    names = {cls.__module__ for part in model.modules() for cls in type(part).__mro__}
    scopes = [vars(sys.modules[name]) for name in names if name in sys.modules and name.split(".")[0] != "torch"]
    changed = [scope for scope in scopes if "set" not in scope]
    for scope in changed:
        scope["set"] = _InOrder
    try:
        yield
    finally:
        for scope in changed:
            del scope["set"]
