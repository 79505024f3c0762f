"""RoPE tables that a model of transformers chooses while it runs, fixed for the longest text that is compiled for.

`dynamic` (NTK) and `longrope` recompute their inverse frequencies from the greatest position: a branch on data, and a
write to a buffer. A graph has one table. Keys that are cached were rotated with one table too, so switching it in the
middle of a text is wrong anyway.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

CHANGING = ("dynamic", "longrope")
FIXED = "fixed by kvpass"  # any name that the model's own update does not know


@contextmanager
def rope_fixed_for(model: nn.Module, max_tokens: int) -> Iterator[tuple[str, ...]]:
    """Let changing tables of `model` be those for `max_tokens` and stay so; yields what was chosen, in words.

    The model gets everything back on exit, also after exceptions.
    """
    notes: list[str] = []
    before: list[tuple[nn.Module, dict[str, Any]]] = []
    try:
        for module in model.modules():
            rope_type = getattr(module, "rope_type", None)
            kinds = rope_type if isinstance(rope_type, dict) else {None: rope_type}
            changing = {layer: kind for layer, kind in kinds.items() if kind in CHANGING}
            if not changing:
                continue
            prefixes = {layer: f"{layer}_" if layer else "" for layer in changing}
            names = ["rope_type", *(f"{prefix}inv_freq" for prefix in prefixes.values())]
            before.append((module, {name: getattr(module, name) for name in names}))
            for layer, kind in changing.items():
                old = getattr(module, f"{prefixes[layer]}inv_freq")
                options = {"layer_type": layer} if layer else {}
                table, _ = ROPE_INIT_FUNCTIONS[kind](module.config, old.device, seq_len=max_tokens, **options)
                setattr(module, f"{prefixes[layer]}inv_freq", table.to(old.device, old.dtype))
                notes.append(f"RoPE of type {kind!r} uses its table for texts of {max_tokens} tokens at every length")
            fixed = {layer: FIXED if layer in changing else kind for layer, kind in kinds.items()}
            setattr(module, "rope_type", fixed if isinstance(rope_type, dict) else FIXED)  # noqa: B010
        yield tuple(dict.fromkeys(notes))
    finally:
        for module, attributes in before:
            for name, value in attributes.items():
                setattr(module, name, value)
