"""Write the parity fixtures: what kvpress itself keeps, on models that the tests can rebuild.

kvpress and kvpass cannot share an environment (kvpress 0.5.5 needs transformers < 5.3), so the
reference runs once, here, and its results are checked in::

    pip install torch==2.13.0 kvpress==0.5.5 rich
    python tests/parity/generate.py

One file holds one model (architecture, dtype) and one context:

===========================  ==================  ==============================================
``input_ids``                [B, S] int64        the context
``question_ids``             [B, 5] int64        tokens that follow it
``full_keys.{layer}``        [B, Hkv, S, D]      uncompressed keys after RoPE, as cached
``full_values.{layer}``      [B, Hkv, S, D]      uncompressed values
``prefill_logits``           [B, V]              after the last context token
``question_logits.none``     [B, 5, V]           after each question token, nothing dropped
``question_logits.{case}``   [B, 5, V]           the same over the compressed cache
``kept.{case}.{layer}``      [B, Hkv, N] int16   kept positions, ascending
``{scores}.{layer}``         [B, Hkv, S] float   the scores that kvpress gave to its top-k
===========================  ==================  ==============================================

``{scores}`` is named by the case's metadata: scores that do not depend on the ratio are stored
once. The file's metadata (key ``parity``, JSON) holds everything else a test needs to know.

Nothing is taken on trust. The kept positions are found by comparing rows of what kvpress left in
the cache with the full keys and values, bit for bit. The question logits come from the cache that
kvpress left, one token at a time at the true text positions, and every one of them is computed a
second time from the *uncompressed* cache under a dense mask per layer and head.

Two things are done to kvpress, both only where its own behaviour cannot serve as a reference:

* Gemma3's text-only class has its sliding-window layers compressed like any other; only the
  multimodal class skips them. Here they are skipped for both.
* On Gemma3 expected attention stops with an AttributeError, because the rotary module now wants
  to know the layer type. Here it is told: full attention. Cases that need this are marked
  (``patched``).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import kvpress
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import nn
from transformers import DynamicCache, PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tiny_models import ARCHITECTURES, tiny_model, weights_checksum

SEED = 0
QUESTION_LENGTH = 5
RATIOS = (0.1, 0.25, 0.5, 0.9)


@dataclass(frozen=True)
class Method:
    """One press with its parameters; ``label`` names it inside a fixture."""

    label: str
    press: str
    press_class: str
    kwargs: dict[str, Any]
    float32_only: bool = False
    scores_depend_on_ratio: bool = False


METHODS = (
    Method("random", "random", "RandomPress", {"seed": 0}),
    Method("knorm", "knorm", "KnormPress", {}),
    Method(
        "streaming_llm",
        "streaming_llm",
        "StreamingLLMPress",
        {"n_sink": 4},
        scores_depend_on_ratio=True,
    ),
    Method("snapkv", "snapkv", "SnapKVPress", {"window_size": 16, "kernel_size": 5}),
    Method("snapkv_default", "snapkv", "SnapKVPress", {}, float32_only=True),
    Method("tova", "tova", "TOVAPress", {}),
    Method("expected_attention", "expected_attention", "ExpectedAttentionPress", {}),
    Method(
        "expected_attention_mean",
        "expected_attention",
        "ExpectedAttentionPress",
        {
            "use_covariance": False,
            "use_vnorm": False,
            "n_future_positions": 64,
            "epsilon": 0.01,
        },
        float32_only=True,
    ),
)


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
)


def pressed_layers(model: PreTrainedModel) -> list[int]:
    """Layers that a press may compress: those that attend to the whole text."""
    count = int(model.config.num_hidden_layers)
    types = getattr(model.config, "layer_types", None) or ["full_attention"] * count
    return [layer for layer in range(count) if types[layer] == "full_attention"]


class FullAttentionRotary(nn.Module):
    """Gemma3's rotary module with the layer type filled in, callable as kvpress calls it."""

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        """Cos and sin for the positions."""
        return self.rotary(x, position_ids, layer_type="full_attention")


@contextlib.contextmanager
def recorded(press: Any, model: PreTrainedModel) -> Iterator[dict[int, torch.Tensor]]:
    """Apply ``press`` to the layers of ``model`` that may be pressed; yield its scores by layer."""
    layers = pressed_layers(model)
    all_scores: dict[int, torch.Tensor] = {}
    score, compress = press.score, press.compress

    def recording_score(module: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        scores: torch.Tensor = score(module, *args, **kwargs)
        all_scores[module.layer_idx] = scores.clone()
        return scores

    def selective_compress(
        module: nn.Module,
        hidden: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        *rest: Any,
    ) -> Any:
        if module.layer_idx not in layers:
            return keys, values
        return compress(module, hidden, keys, values, *rest)

    press.score, press.compress = recording_score, selective_compress
    decoder_layers = model.model.layers
    with press(model):
        if model.config.model_type == "gemma3_text":
            for layer in layers:
                rotary = FullAttentionRotary(model.model.rotary_emb)
                decoder_layers[layer].self_attn.rotary_emb = rotary
        yield all_scores
    for decoder_layer in decoder_layers:
        del decoder_layer.self_attn.rotary_emb  # kvpress leaves it there


def require(condition: bool, message: str) -> None:
    """Stop unless ``condition`` holds: a fixture that fails a check must not be written."""
    if not condition:
        raise AssertionError(message)


def matched_positions(compressed: Any, full: Any) -> torch.Tensor:
    """Find where each row of a cache layer lies in the full one, by bit equality; ascending.

    Both keys and values must match, at one position and no other; so what is returned is the
    gather that made ``compressed``, whatever order it was made in.
    """
    rows = torch.cat([compressed.keys, compressed.values], -1)
    full_rows = torch.cat([full.keys, full.values], -1)
    equal = (rows[:, :, :, None] == full_rows[:, :, None]).all(-1)  # [B, Hkv, N, S]
    require(bool((equal.sum(-1) == 1).all()), "a cached row matches no full row, or several")
    positions = equal.int().argmax(-1)
    index = positions[..., None].expand_as(compressed.keys)
    require(torch.equal(compressed.keys, full.keys.gather(2, index)), "keys are no gather")
    require(torch.equal(compressed.values, full.values.gather(2, index)), "values are no gather")
    positions = positions.sort(-1).values
    require(bool((positions.diff(dim=-1) > 0).all()), "a position was kept twice")
    return positions


def copied(cache: Any) -> DynamicCache:
    """Copy a cache: a forward call appends to the one it is given."""
    copy = DynamicCache()
    for layer, entries in enumerate(cache.layers):
        copy.update(entries.keys.clone(), entries.values.clone(), layer)
    return copy


def answer(model: PreTrainedModel, cache: DynamicCache, question: torch.Tensor, first: int) -> torch.Tensor:
    """Logits after each question token, one token a call at its true text position.

    Under sdpa a single token gets no mask in a full-attention layer: it sees everything cached.
    Several tokens in one call would get one that is made from the length of layer 0, which is
    wrong where layers differ in length (Gemma3). Sliding layers are whole, so theirs is right.
    """
    logits = []
    for step in range(question.shape[1]):
        position_ids = torch.full((question.shape[0], 1), first + step)
        out = model(question[:, step : step + 1], position_ids=position_ids, past_key_values=cache)
        logits.append(out.logits)
    return torch.cat(logits, 1)


def answer_by_mask(
    model: PreTrainedModel,
    full: Any,
    kept: dict[int, torch.Tensor],
    question: torch.Tensor,
) -> torch.Tensor:
    """Compute the same logits from the full cache under a dense mask per layer and head.

    All question tokens go in one call. A layer without an entry in ``kept`` sees everything that
    is causal and, if it is a sliding layer, inside the window.
    """
    batch, new = question.shape
    past = full.layers[0].keys.shape[2]
    heads = int(model.config.num_attention_heads)
    group = heads // int(model.config.num_key_value_heads)
    query_at = torch.arange(past, past + new)[:, None]
    key_at = torch.arange(past + new)[None]
    causal = key_at <= query_at
    pressed = pressed_layers(model)
    hooks = []
    for layer, decoder_layer in enumerate(model.model.layers):
        seen = causal.expand(batch, heads, new, past + new).clone()
        if layer in kept:
            is_kept = torch.zeros(*kept[layer].shape[:2], past, dtype=torch.bool)
            is_kept.scatter_(2, kept[layer], True)
            seen[..., :past] &= is_kept.repeat_interleave(group, 1)[:, :, None]
        elif layer not in pressed:
            seen &= key_at > query_at - int(model.config.sliding_window)
        mask = torch.zeros(seen.shape, dtype=model.dtype).masked_fill_(~seen, float("-inf"))

        def with_mask(
            _module: nn.Module, args: Any, kwargs: dict[str, Any], mask: torch.Tensor = mask
        ) -> tuple[Any, dict[str, Any]]:
            return args, {**kwargs, "attention_mask": mask}

        hooks.append(decoder_layer.self_attn.register_forward_pre_hook(with_mask, with_kwargs=True))
    try:
        out = model(question, position_ids=query_at.T.expand(batch, -1), past_key_values=copied(full))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.as_tensor(out.logits)


class Builder:
    """Collects the tensors and the metadata of one file."""

    def __init__(self, context: Context, dtype_name: str) -> None:
        dtype = getattr(torch, dtype_name)
        self.context = context
        self.model = tiny_model(context.arch, seed=SEED, dtype=dtype)
        self.pressed = pressed_layers(self.model)
        tokens = self.draw_tokens()
        self.ids, self.question = tokens[:, : context.length], tokens[:, context.length :]
        # A DynamicCache without a config keeps sliding layers whole; the window is in the mask.
        self.full: Any = DynamicCache()
        self.prefill_logits = self.prefill(self.full)
        self.methods = [m for m in METHODS if dtype == torch.float32 or not m.float32_only]
        # Rounding only: the two paths add up the same numbers in a different order.
        self.tolerance = 2e-5 if dtype == torch.float32 else 0.25
        self.worst_difference = 0.0
        self.tensors: dict[str, Any] = {
            "input_ids": self.ids,
            "question_ids": self.question,
            "prefill_logits": self.prefill_logits[:, 0],
        }
        self.metadata: dict[str, Any] = {
            "arch": context.arch,
            "dtype": dtype_name,
            "seed": SEED,
            "weights": weights_checksum(self.model),
            "num_layers": len(self.full.layers),
            "pressed_layers": self.pressed,
            "versions": {name: version(name) for name in ("kvpress", "transformers", "torch")},
            "cases": [],
        }
        for layer, entries in enumerate(self.full.layers):
            self.tensors[f"full_keys.{layer}"] = entries.keys
            self.tensors[f"full_values.{layer}"] = entries.values
        self.ask(copied(self.full), {}, "none")

    def draw_tokens(self) -> torch.Tensor:
        """Context and question, [B, S + 5]; the ids below 3 are left to special tokens."""
        count = self.context.length + QUESTION_LENGTH
        vocabulary = int(self.model.config.vocab_size)
        generator = torch.Generator().manual_seed(1000 + self.context.length)
        if self.context.repeats:
            shape = (self.context.batch, count)
            return torch.randint(3, vocabulary, shape, generator=generator)
        rows = [torch.randperm(vocabulary - 3, generator=generator)[:count] + 3 for _ in range(self.context.batch)]
        return torch.stack(rows)

    def prefill(self, cache: DynamicCache) -> torch.Tensor:
        """Run the context through the model; return the logits after its last token."""
        logits: torch.Tensor = self.model(self.ids, past_key_values=cache, logits_to_keep=1).logits
        return logits

    def add(self, method: Method, ratio: float) -> None:
        """Run one method at one ratio and store what it did."""
        case = f"{method.label}@{ratio}"
        press = getattr(kvpress, method.press_class)(compression_ratio=ratio, **method.kwargs)
        cache = DynamicCache()
        with recorded(press, self.model) as scores:
            logits = self.prefill(cache)
        require(torch.equal(logits, self.prefill_logits), f"{case}: the prefill's logits changed")
        require(sorted(scores) == self.pressed, f"{case}: layers {sorted(scores)} were pressed")
        kept = {}
        for layer, entries in enumerate(cache.layers):
            positions = matched_positions(entries, self.full.layers[layer])
            if layer in self.pressed:
                kept[layer] = positions
                self.tensors[f"kept.{case}.{layer}"] = positions.to(torch.int16)
            else:
                require(positions.shape[-1] == self.context.length, f"{case}: {layer} was pressed")
        record = {
            "name": case,
            "label": method.label,
            "press": method.press,
            "kwargs": method.kwargs,
            "ratio": ratio,
            "patched": self.context.arch == "gemma3_text" and method.press == "expected_attention",
        }
        if method.press != "random":  # its numbers are its own; only the counts compare
            record["scores"] = self.store_scores(method, case, scores)
            record["score_dtype"] = str(scores[self.pressed[0]].dtype).removeprefix("torch.")
            self.ask(cache, kept, case)
        self.metadata["cases"].append(record)

    def store_scores(self, method: Method, case: str, scores: dict[int, torch.Tensor]) -> str:
        """Store the scores, once where they are the same for all ratios; return their name."""
        name = f"scores.{case if method.scores_depend_on_ratio else method.label}"
        for layer, values in scores.items():
            stored = self.tensors.setdefault(f"{name}.{layer}", values.float())
            require(torch.equal(stored, values.float()), f"{case}: scores depend on the ratio")
        return name

    def ask(self, cache: DynamicCache, kept: dict[int, torch.Tensor], case: str) -> None:
        """Store the question's logits after comparing them with the dense-mask computation."""
        logits = answer(self.model, cache, self.question, self.context.length)
        expected = answer_by_mask(self.model, self.full, kept, self.question)
        difference = (logits.float() - expected.float()).abs().max().item()
        require(difference <= self.tolerance, f"{case}: logits off by {difference}")
        self.worst_difference = max(self.worst_difference, difference)
        self.tensors[f"question_logits.{case}"] = logits


@torch.no_grad()
def build(context: Context, dtype: str) -> Builder:
    """Run every method at every ratio on one context."""
    builder = Builder(context, dtype)
    for method in builder.methods:
        for ratio in RATIOS:
            builder.add(method, ratio)
    return builder


def main() -> None:
    """Write the fixtures that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent / "fixtures")
    parser.add_argument("--arch", choices=ARCHITECTURES, action="append", help="default: all")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), action="append", help="default: both")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the order of a sum must not depend on the machine's core count
    logging.getLogger("kvpress").setLevel(logging.ERROR)  # Gemma3's text-only class is "not tested"
    console = Console()
    args.output.mkdir(parents=True, exist_ok=True)
    total = 0
    for context in CONTEXTS:
        if args.arch and context.arch not in args.arch:
            continue
        for dtype in args.dtype or ("float32", "bfloat16"):
            start = time.perf_counter()
            built = build(context, dtype)
            path = args.output / context.file_name(dtype)
            tensors = {name: tensor.contiguous() for name, tensor in built.tensors.items()}
            save_file(tensors, path, metadata={"parity": json.dumps(built.metadata)})
            size = path.stat().st_size
            total += size
            console.print(
                f"{path.name}: {len(built.metadata['cases'])} cases, {size / 1024:.0f} KiB, "
                f"logits agree with the dense mask to {built.worst_difference:.1e}, "
                f"{time.perf_counter() - start:.1f} s",
                soft_wrap=True,
            )
    console.print(f"{total / 2**20:.2f} MiB", soft_wrap=True)


if __name__ == "__main__":
    main()
