"""What the table compares: every press once, wrappers around the press that they are mostly used with."""

from collections.abc import Callable
from pathlib import Path

from kvpass.press import Press
from kvpass.presses.per_layer import PerLayer
from kvpass.presses.think import ThinK
from kvpass.registry import parse_press, registered_presses

AROUND = {
    "block": "block(keydiff)",
    "chunk": "chunk(snapkv, chunk_length=512)",
    "chunkkv": "chunkkv(snapkv)",
    "composed": "composed([snapkv, think(0.25)])",
    "criticalkv": "criticalkv(expected_attention)",
    "entropy_gated_chunkkv": "entropy_gated_chunkkv(snapkv)",
    "key_rerotation": "key_rerotation(streaming_llm)",
    "merging": "merging(snapkv)",
    "simlayerkv": "simlayerkv(lazy_threshold=0.8, n_recent=512)",
}
LEARNED = {"qfilter": "filters", "expected_attention_stats": "stats_folder"}
UNTRAINED = frozenset({"kvzap"})  # needs a network trained for the model

Subject = Callable[[float, int], Press]  # of a ratio and the number of layers


def subjects(learned: Path) -> dict[str, tuple[Subject, bool]]:
    """By label: how to make the press for a ratio, and whether it must be made anew for each.

    `learned` is a folder with `qfilter.safetensors` and `expected_attention_stats.safetensors`.
    """
    table: dict[str, tuple[Subject, bool]] = {}
    for name in registered_presses():
        if name in UNTRAINED:
            continue
        if name in LEARNED:
            text = f"{name}({LEARNED[name]}={str(learned / f'{name}.safetensors')!r})"
            table[name] = (_fixed(text), False)
        elif name == "think":
            table["think (channels)"] = (lambda ratio, layers: ThinK(ratio), True)
        elif name == "per_layer":
            table["per_layer(snapkv, falling)"] = (_falling, True)
        else:
            text = AROUND.get(name, name)
            table[text] = (_fixed(text), False)
    return table


def _fixed(text: str) -> Subject:
    return lambda ratio, layers: parse_press(text)


def _falling(ratio: float, layers: int) -> Press:
    """From 0.15 less in the first layer to 0.15 more in the last."""
    steps = [0.3 * layer / (layers - 1) - 0.15 for layer in range(layers)] if layers > 1 else [0.0]
    return PerLayer(parse_press("snapkv"), tuple(ratio + step for step in steps))
