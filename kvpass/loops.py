"""A loop inside a graph whose length is a size of the prompt."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch._higher_order_ops.while_loop import while_loop as traced_while_loop
from torch._subclasses.fake_tensor import FakeTensor

Carried = tuple[Tensor, ...]


def unaliased(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The same tensors, copied where two are views of one (of a fused projection, say): a traced loop allows none."""
    seen: set[int] = set()
    result = []
    for tensor in tensors:
        if is_traced(tensor):
            storage = tensor.untyped_storage()._cdata
            tensor = tensor.clone() if storage in seen else tensor
            seen.add(storage)
        result.append(tensor)
    return tuple(result)


def is_traced(tensor: Tensor) -> bool:
    """Whether a graph is being made, rather than numbers."""
    return isinstance(tensor, FakeTensor)


def while_loop(unfinished: Callable[..., Tensor], step: Callable[..., Carried], carried: Carried) -> Carried:
    """Replace `carried` by `step(*carried)` as long as `unfinished(*carried)`, a bool[]; shapes stay what they are.

    Traced into one node with the body as a graph of its own; on real tensors it simply runs.
    """
    if any(map(is_traced, carried)):
        # What was traced before must not turn a press's numbers into inputs of the loop: graphs do not depend on it.
        with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
            traced: Carried = traced_while_loop(unfinished, step, carried)
        return traced
    while bool(unfinished(*carried)):
        carried = step(*carried)
    return carried
