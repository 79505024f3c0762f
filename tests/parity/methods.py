"""What is compared: methods, parameters, contexts. Read by the generator (with kvpress) and by the tests (without)."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from tiny_models import ARCHITECTURES

SEED = 0
QUESTION_LENGTH = 5
RATIOS = (0.1, 0.25, 0.5, 0.9)
DELIMITER = 2  # between context and question for finch; the ids below 3 occur in no context
FINCH_QUESTION = 9
BOTH = ("float32", "bfloat16")


@dataclass(frozen=True)
class Spec:
    """A press by its registered name, with options and the presses inside it."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    parts: tuple[Spec, ...] = ()

    def described(self) -> str:
        """The spec as a fixture remembers it, so that a fixture of another spec is noticed."""
        parts = [part.described() for part in self.parts] + [f"{key}={self.options[key]}" for key in self.options]
        return f"{self.name}({', '.join(parts)})" if parts else self.name


# A sketch's inverse, or what one press keeps of what another kept: the last bit of a key moves pairs far from any tie.
ROUNDED = ("leverage", "leverage_narrow", "block_keydiff", "composed_knorm_keydiff", "composed_snapkv_knorm")


@dataclass(frozen=True)
class Method:
    """A press in one fixture, and what can be compared of it.

    decided_by
        "score": the pairs with the best scores stay, so that a difference can be told from a tie. "chunk": the same in
        every `chunk` tokens. "positions": all heads keep the same, by the sum of their scores; a difference is excused
        where the sums are equal. "": something else decides, the kept sets must be equal.
    found_by
        What tells where a cached row came from: the other half may be changed by the method.
    archs
        Each test compiles a model. Every method meets all architectures that kvpress runs it on, its variants and
        wrappers around other presses one or two.
    stores
        What the fixture holds besides positions, because the method changes it.
    by_row
        kvpress lets the rows of a batch decide together; each row is given to it alone.
    signed
        Scores lie around zero, so ties are measured in deviations of the score, not in its size.
    """

    label: str
    press: Spec
    ratios: tuple[float | None, ...] = (0.25, 0.9)
    archs: tuple[str, ...] = ARCHITECTURES
    dtypes: tuple[str, ...] = ("float32",)  # on all architectures; on Llama see `runs`
    decided_by: str = "score"
    chunk: int = 0
    found_by: str = "both"
    stores: tuple[str, ...] = ()
    by_row: bool = False
    signed: bool = False
    eager: bool = False
    question: int | None = None
    rerotates: bool = False
    scores_depend_on_ratio: bool = False
    counts_only: bool = False  # kvpress draws numbers of its own

    def runs(self, arch: str, dtype: str) -> bool:
        """Whether it is compared there. In bfloat16 on Llama all are but those that rounding decides."""
        rounded = dtype == "bfloat16" and arch == "llama" and self.label not in ROUNDED
        return arch in self.archs and (dtype in self.dtypes or rounded)


# The files without -more: the presses of the first release, at four ratios.
METHODS = (
    Method("random", Spec("random", {"seed": 0}), RATIOS, dtypes=BOTH, counts_only=True),
    Method("knorm", Spec("knorm"), RATIOS, dtypes=BOTH),
    Method("streaming_llm", Spec("streaming_llm", {"n_sink": 4}), RATIOS, dtypes=BOTH, scores_depend_on_ratio=True),
    Method("snapkv", Spec("snapkv", {"window_size": 16, "kernel_size": 5}), RATIOS, dtypes=BOTH),
    Method("snapkv_default", Spec("snapkv"), RATIOS),
    Method("tova", Spec("tova"), RATIOS, dtypes=BOTH),
    Method("expected_attention", Spec("expected_attention"), RATIOS, dtypes=BOTH),
    Method(
        "expected_attention_mean",
        Spec(
            "expected_attention",
            {"use_covariance": False, "use_vnorm": False, "n_future_positions": 64, "epsilon": 0.01},
        ),
        RATIOS,
    ),
)

KNORM, KEYDIFF, STREAMING = Spec("knorm"), Spec("keydiff"), Spec("streaming_llm")
SNAPKV = Spec("snapkv", {"window_size": 8})
EXPECTED = Spec("expected_attention", {"n_future_positions": 64})
LAGKV = Spec("lagkv", {"lag_size": 16, "cross_scoring": True})
THINK = Spec("think", {"key_channel_compression_ratio": 0.4, "window_size": 8})
LLAMA = ("llama",)
NOT_GEMMA = tuple(arch for arch in ARCHITECTURES if arch != "gemma3_text")


def _joint(label: str, press: Spec, **options: Any) -> Method:
    """Rows of a batch are standardised together in kvpress; scores lie around 0."""
    return Method(label, press, by_row=True, signed=True, **options)


SCORERS = (
    Method("random", Spec("random", {"seed": 3}), dtypes=BOTH),
    Method("pyramidkv", Spec("pyramidkv", {"window_size": 8}), dtypes=BOTH),
    Method("observed_attention", Spec("observed_attention"), eager=True),
    Method("expected_attention_stats", Spec("expected_attention_stats", {"n_future_positions": 64}), dtypes=BOTH),
    Method("qfilter", Spec("qfilter"), dtypes=BOTH, signed=True),
    Method("keydiff", KEYDIFF, dtypes=BOTH, signed=True),
    Method("lagkv", Spec("lagkv", {"lag_size": 16}), dtypes=BOTH),
    Method("cur", Spec("cur"), dtypes=BOTH),
    Method("cap", Spec("cap", {"n_future_positions": 64}), dtypes=BOTH),
    _joint("leverage", Spec("leverage")),
    _joint("non_causal_attention", Spec("non_causal_attention", {"chunk_size": 32}), dtypes=BOTH),
    _joint("compactor", Spec("compactor", {"chunk_size": 32}), scores_depend_on_ratio=True),
    Method("kvzap", Spec("kvzap", {"model_type": "mlp"}), dtypes=BOTH, signed=True),
)

VARIANTS = (
    Method("pyramidkv_steep", Spec("pyramidkv", {"window_size": 4, "kernel_size": 3, "beta": 8}), (0.6,), LLAMA),
    Method("lagkv_cross", LAGKV, (0.5,), LLAMA, dtypes=BOTH),
    Method("lagkv_short", Spec("lagkv"), (0.5,), LLAMA),
    Method(
        "cur_random",
        Spec("cur", {"use_random_leverage": True, "leverage_type": "kv_avg", "num_sinks": 2, "seed": 3}),
        (0.5,),
        LLAMA,
    ),
    Method("cur_global", Spec("cur", {"leverage_type": "key", "use_local_approximation": False}), (0.5,), LLAMA),
    _joint("leverage_narrow", Spec("leverage", {"sketch_dimension": 8, "seed": 3}), ratios=(0.5,), archs=LLAMA),
    _joint(
        "compactor_blended",
        Spec("compactor", {"blending": 0.7, "sink_size_start": 2, "sink_size_end": 1, "seed": 3}),
        ratios=(0.5,),
        archs=LLAMA,
    ),
    Method("kvzap_linear", Spec("kvzap", {"model_type": "linear"}), (0.5,), LLAMA, signed=True),
)


def _lazy(name: str, threshold: float, *archs: str) -> Method:
    options = {"lazy_threshold": threshold, "n_last": 2, "n_recent": 40, "n_initial": 3}
    return Method(f"simlayerkv_{name}", Spec("simlayerkv", options), (None,), archs, decided_by="", by_row=True)


def _finch(label: str, *archs: str, ratios: tuple[float, ...] = (0.5,), **options: Any) -> Method:
    """Keys are re-rotated unless told otherwise, so what is kept is found by the values."""
    rotates = options.get("rerotate_keys", True)
    chunk = options.get("chunk_length", 0)
    return Method(
        label,
        Spec("finch", options),
        ratios,
        archs,
        dtypes=BOTH,
        decided_by="chunk" if chunk else "score",
        chunk=chunk,
        found_by="values" if rotates else "both",
        stores=("keys",) if rotates else (),
        by_row=True,
        question=FINCH_QUESTION,
        rerotates=rotates,
    )


OWN_LOGIC = (
    Method("think", THINK, (None,), decided_by="", found_by="values", stores=("keys",)),
    # elsewhere rounding in bfloat16 decides between two channels
    Method("think_bf16", THINK, (None,), LLAMA, ("bfloat16",), decided_by="", found_by="values", stores=("keys",)),
    _lazy("none", 0.95, "llama"),
    _lazy("some", 0.42, "llama", "qwen2"),
    _lazy("all", 0.02, *ARCHITECTURES),
    _finch("finch", *NOT_GEMMA, ratios=(0.5, 0.75)),
    _finch("finch_chunks", "llama", chunk_length=40, normalize_scores=False),
    _finch("finch_in_place", "llama", rerotate_keys=False),
)


def _composed(*parts: tuple[Spec, float | None]) -> Spec:
    return Spec("composed", {"ratios": tuple(ratio for _, ratio in parts)}, tuple(part for part, _ in parts))


def _around(name: str, inner: Spec, *archs: str, suffix: str = "", options: Any = None, **rules: Any) -> Method:
    """A wrapper around one press."""
    label = f"{name}_{inner.name}{suffix}"
    return Method(label, Spec(name, options or {}, (inner,)), archs=archs, **({"ratios": (0.5, 0.75)} | rules))


# Not on Qwen2 and Phi3, whose configs have no head_dim: kvpress stops.
CRITICAL: dict[str, Any] = {"scores_depend_on_ratio": True}
CHUNK: dict[str, Any] = {"options": {"chunk_length": 24}, "decided_by": "chunk", "chunk": 24, "signed": True}
CHUNKKV: dict[str, Any] = {"options": {"chunk_length": 7}, "decided_by": "positions", "by_row": True}
GATED: dict[str, Any] = {"decided_by": "positions", "by_row": True, "ratios": (0.3, 0.75)}
BLOCK: dict[str, Any] = {"options": {"block_size": 24}, "decided_by": ""}
# Not on Gemma3, whose rotary module kvpress cannot ask for its frequencies.
ROTATED: dict[str, Any] = {"found_by": "values", "stores": ("keys",), "rerotates": True}
MERGED: dict[str, Any] = {"found_by": "keys", "stores": ("values",)}
LAYERED: dict[str, Any] = {"options": {"compression_ratios": (0.25, 0.8)}, "ratios": (None,)}
COMPOSED: dict[str, Any] = {"ratios": (None,), "decided_by": ""}

WRAPPED = (
    _around("criticalkv", KNORM, "llama", "mistral", "qwen3", "gemma3_text", signed=True, **CRITICAL),
    _around("criticalkv", SNAPKV, "mistral", "qwen3", **CRITICAL),
    _around("criticalkv", EXPECTED, "llama", **CRITICAL),
    _around(
        "criticalkv", SNAPKV, "llama", suffix="_other", options={"first_stage_ratio": 0.25, "epsilon": 0.01}, **CRITICAL
    ),
    _around("chunk", KNORM, *ARCHITECTURES, **CHUNK),
    _around("chunk", KEYDIFF, "llama", **CHUNK),
    _around("chunkkv", KNORM, *ARCHITECTURES, **CHUNKKV),
    _around("chunkkv", SNAPKV, "llama", **CHUNKKV),
    _around("chunkkv", EXPECTED, "gemma3_text", **CHUNKKV),
    _around("entropy_gated_chunkkv", KNORM, *ARCHITECTURES, **GATED),
    _around("entropy_gated_chunkkv", SNAPKV, "llama", **GATED),
    _around("entropy_gated_chunkkv", EXPECTED, "llama", **GATED),
    _around(
        "entropy_gated_chunkkv",
        EXPECTED,
        "qwen3",
        suffix="_other",
        options={"chunk_length": 6, "low_entropy_chunk_length": 2},
        **GATED,
    ),
    _around("block", KNORM, *ARCHITECTURES, **BLOCK),
    _around("block", KEYDIFF, "llama", **BLOCK),
    _around("key_rerotation", SNAPKV, *NOT_GEMMA, dtypes=BOTH, **ROTATED),
    _around("key_rerotation", STREAMING, "qwen2", scores_depend_on_ratio=True, **ROTATED),
    _around("key_rerotation", KNORM, "mistral", **ROTATED),
    _around("key_rerotation", EXPECTED, "qwen3", **ROTATED),
    _around("merging", KNORM, *ARCHITECTURES, dtypes=BOTH, **MERGED),
    _around("merging", SNAPKV, "gemma3_text", **MERGED),
    _around("merging", EXPECTED, "llama", **MERGED),
    _around(
        "merging",
        KNORM,
        "llama",
        suffix="_gated",
        options={"similarity_threshold": 0.3, "merge_fraction": 0.6},
        **MERGED,
    ),
    _around("per_layer", KNORM, *NOT_GEMMA, **LAYERED),
    _around("per_layer", SNAPKV, "llama", **LAYERED),
    _around("per_layer", EXPECTED, "llama", **LAYERED),
    _around("per_layer", KNORM, "llama", suffix="_whole", **LAYERED | {"options": {"compression_ratios": (0.0, 0.6)}}),
    _around("per_layer", KEYDIFF, "llama", suffix="_none", **LAYERED | {"options": {"compression_ratios": (0.5, 1.0)}}),
    Method("composed_knorm_keydiff", _composed((KNORM, 0.3), (KEYDIFF, 0.4)), archs=LLAMA, **COMPOSED),
    Method("composed_snapkv_knorm", _composed((SNAPKV, 0.4), (KNORM, 0.5)), **COMPOSED),
    Method("composed_expected_keydiff", _composed((EXPECTED, 0.4), (KEYDIFF, 0.5)), archs=LLAMA, **COMPOSED),
    Method(
        "composed_snapkv_think",
        _composed((SNAPKV, 0.5), (THINK, None)),
        archs=LLAMA,
        found_by="values",
        stores=("keys",),
        **COMPOSED,
    ),
)

MORE = (*SCORERS, *VARIANTS, *OWN_LOGIC, *WRAPPED)


@dataclass(frozen=True)
class Context:
    """A model family and the text it is given; lengths are odd on purpose.

    With ``repeats`` tokens occur more than once. In the first layer equal tokens have keys of
    equal norm, so the choice between them is rounding. Without, no score ties by construction.
    """

    arch: str
    batch: int
    length: int
    repeats: bool = False
    tag: str = ""
    methods: tuple[Method, ...] = METHODS
    dtypes: tuple[str, ...] = BOTH

    def file_name(self, dtype: str) -> str:
        """Name of the fixture file."""
        return f"{self.arch}-{dtype}{self.tag}.safetensors"


CONTEXTS = (
    Context("llama", batch=2, length=131, repeats=True),
    Context("llama", batch=1, length=203, tag="-s203"),
    Context("mistral", batch=1, length=97),
    Context("qwen2", batch=1, length=149),
    Context("qwen3", batch=2, length=113),
    Context("phi3", batch=1, length=127),
    Context("gemma3_text", batch=1, length=109),
    Context("llama", batch=2, length=89, tag="-more-b2", methods=(*SCORERS, *VARIANTS), dtypes=("float32",)),
    Context("llama", batch=1, length=131, tag="-more", methods=(*OWN_LOGIC, *WRAPPED), dtypes=("float32",)),
    Context("llama", batch=1, length=131, tag="-more", methods=MORE, dtypes=("bfloat16",)),
    Context("mistral", batch=1, length=97, tag="-more", methods=MORE),
    Context("qwen2", batch=1, length=119, tag="-more", methods=MORE),
    Context("qwen3", batch=1, length=113, tag="-more", methods=MORE),
    Context("phi3", batch=1, length=127, tag="-more", methods=MORE),
    Context("gemma3_text", batch=1, length=109, tag="-more", methods=MORE),
)


def learned(name: str, options: dict[str, Any], shape: dict[str, int]) -> dict[str, torch.Tensor]:
    """The random tensors that stand for what a press has learned, named as in its file; {} if it learns nothing.

    shape: layers, heads, kv_heads, key_size, hidden_size of the model.
    """
    layers, heads, kv_heads, size, hidden = (
        shape[key] for key in ("layers", "heads", "kv_heads", "key_size", "hidden_size")
    )
    generator = torch.Generator().manual_seed(77)

    def drawn(*sizes: int) -> torch.Tensor:
        # Not torch.randn, whose last bit depends on the CPU's vector units.
        return (torch.rand(*sizes, generator=generator) - 0.5) * 12**0.5

    if name == "qfilter":
        return {"q_filters": drawn(layers, kv_heads, size)}
    if name == "expected_attention_stats":
        mean, root = drawn(layers, heads, size), drawn(layers, heads, size, size) / size**0.5
        return {"query_mean": mean, "query_cov": root @ root.transpose(-1, -2)}
    if name != "kvzap":
        return {}
    widths = [hidden, 24, kv_heads] if options["model_type"] == "mlp" else [hidden, kv_heads]
    tensors = {}
    for layer in range(layers):
        for i, (given, made) in enumerate(pairwise(widths)):
            prefix = f"layers.{layer}.{2 * i}" if len(widths) == 3 else f"layers.{layer}"
            tensors[f"{prefix}.weight"] = drawn(made, given) / given**0.5
            tensors[f"{prefix}.bias"] = drawn(made)
    return tensors


def shape_of(config: Any) -> dict[str, int]:
    """What `learned` wants to know of a model."""
    heads = int(config.num_attention_heads)
    return {
        "layers": int(config.num_hidden_layers),
        "heads": heads,
        "kv_heads": int(config.num_key_value_heads),
        "key_size": int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        "hidden_size": int(config.hidden_size),
    }
