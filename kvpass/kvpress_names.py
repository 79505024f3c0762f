"""Presses of NVIDIA's kvpress, taken over by class name and fields; kvpress itself is never imported."""

import dataclasses
from collections.abc import Callable
from typing import Any

from kvpass.errors import PressError
from kvpass.press import Press

NAMES = {
    "RandomPress": "random",
    "KnormPress": "knorm",
    "StreamingLLMPress": "streaming_llm",
    "SnapKVPress": "snapkv",
    "PyramidKVPress": "pyramidkv",
    "TOVAPress": "tova",
    "ObservedAttentionPress": "observed_attention",
    "ExpectedAttentionPress": "expected_attention",
    "ExpectedAttentionStatsPress": "expected_attention_stats",
    "QFilterPress": "qfilter",
    "KeyDiffPress": "keydiff",
    "LagKVPress": "lagkv",
    "CURPress": "cur",
    "CapPress": "cap",
    "LeverageScorePress": "leverage",
    "NonCausalAttnPress": "non_causal_attention",
    "CompactorPress": "compactor",
    "KVzapPress": "kvzap",
    "ThinKPress": "think",
    "SimLayerKVPress": "simlayerkv",
    "FinchPress": "finch",
    "CriticalKVPress": "criticalkv",
    "ChunkPress": "chunk",
    "ChunkKVPress": "chunkkv",
    "EntropyGatedChunkKVPress": "entropy_gated_chunkkv",
    "BlockPress": "block",
    "KeyRerotationPress": "key_rerotation",
    "MergingPress": "merging",
    "PerLayerCompressionPress": "per_layer",
    "ComposedPress": "composed",
}

OTHER_NAMES = {"delimiter": "delimiter_token_id"}  # fields that are called otherwise there


def is_kvpress(press: object) -> bool:
    """Whether it is an object of a class of kvpress, or of one derived from it."""
    return any(cls.__module__.split(".")[0] == "kvpress" for cls in type(press).__mro__)


def from_kvpress(press: object, class_of: Callable[[str], type[Press]]) -> tuple[Press, float | None]:
    """The same press here, and its ratio; `class_of` finds our class by name.

    Raises `PressError` for a class that has no counterpart.
    """
    kind = type(press).__name__
    if kind not in NAMES:
        raise PressError(f"{kind} of kvpress has no counterpart here yet; known are {', '.join(sorted(NAMES))}")
    cls = class_of(NAMES[kind])
    fields = {}
    names = [field.name for field in dataclasses.fields(cls)]
    for name in names:
        value = getattr(press, OTHER_NAMES.get(name, name), None)
        if value is not None:
            fields[name] = _converted(value, class_of)
    parts = getattr(press, "presses", None)
    if parts is not None and "ratios" in names:
        fields["ratios"] = tuple(_ratio_of(part) for part in parts)
    ours = cls(**fields)
    return ours, _ratio_of(press) if ours.needs_budget else None


def _converted(value: Any, class_of: Callable[[str], type[Press]]) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_converted(element, class_of) for element in value)
    return from_kvpress(value, class_of)[0] if is_kvpress(value) else value


def _ratio_of(press: object) -> float | None:
    if type(press).__name__ in ("ThinKPress", "SimLayerKVPress", "PerLayerCompressionPress"):
        return None  # derived from their own settings
    ratio = getattr(press, "compression_ratio", None)
    return None if ratio is None else float(ratio)
