"""Write the parity fixtures: what kvpress itself keeps, on models that the tests can rebuild.

kvpress and kvpass cannot share an environment (kvpress 0.5.5 needs transformers < 5.3), so the
reference runs once, here, and its results are checked in::

    pip install torch==2.13.0 kvpress==0.5.5 rich
    python tests/parity/generate.py

`methods.py` lists what is run. One file holds one model (architecture, dtype) and one context:

===========================  ==================  ==============================================
``input_ids``                [B, S] int64        the context
``question_ids``             [B, 5] int64        tokens that follow it
``full_keys.{layer}``        [B, Hkv, S, D]      uncompressed keys after RoPE, as cached
``full_values.{layer}``      [B, Hkv, S, D]      uncompressed values
``prefill_logits``           [B, V]              after the last context token
``question_logits.none``     [B, 5, V]           after each question token, nothing dropped
``question_logits.{case}``   [B, 5, V]           the same over the compressed cache
``kept.{case}.{layer}``      [B, Hkv, N] int16   kept positions, ascending
``keys.{case}.{layer}``      [B, Hkv, N, D]      cached keys in that order, if the method changes them
``values.{case}.{layer}``    [B, Hkv, N, D]      cached values, likewise
``{scores}.{layer}``         [B, Hkv, S] float   the scores that kvpress selected by, if it has such
===========================  ==================  ==============================================

``{scores}`` is named by the case's metadata: scores that do not depend on the ratio are stored
once. The file's metadata (key ``parity``, JSON) holds everything else a test needs to know.

Nothing is taken on trust. The kept positions are found by comparing rows of what kvpress left in
the cache with the full keys and values, bit for bit (with the half that the method leaves alone).
The question logits come from the cache that kvpress left, one token at a time at the positions
where the text goes on, and every one of them is computed a second time from the *uncompressed*
cache, changed rows put in their places, under a dense mask per layer and head.

What is done to kvpress, only where its own behaviour cannot serve as a reference:

* Gemma3's text-only class has its sliding-window layers compressed like any other; only the
  multimodal class skips them. Here they are skipped for both.
* On Gemma3 presses that rotate stop with an AttributeError, because the rotary module now wants
  to know the layer type. Here it is told: full attention. Cases that need this are marked
  (``patched``). Re-rotation cannot be helped that way and is left out there.
* Random numbers are those that kvpass draws for the same seed, layer and head.
* Presses that let the rows of a batch decide together get one row at a time.
* Learned tensors are random ones instead of those of the hub.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import kvpress_side
import torch
from kvpress_side import Outcome, pressed_layers
from methods import CONTEXTS, METHODS, QUESTION_LENGTH, SEED, Context, Method
from rich.console import Console
from safetensors.torch import save_file
from tiny_models import ARCHITECTURES, tiny_model, weights_checksum
from transformers import DynamicCache, PreTrainedModel

ROTATING = ("expected_attention", "expected_attention_stats", "cap")


def require(condition: bool, message: str) -> None:
    """Stop unless ``condition`` holds: a fixture that fails a check must not be written."""
    if not condition:
        raise AssertionError(message)


def matched_positions(compressed: Any, full: Any, found_by: str) -> torch.Tensor:
    """Find where each row of a cache layer lies in the full one, by bit equality; in the order of the cache.

    Each row must match at one position and no other, and no position twice.
    """
    parts = ("keys", "values") if found_by == "both" else (found_by,)
    rows, full_rows = (torch.cat([getattr(x, part) for part in parts], -1) for x in (compressed, full))
    equal = (rows[:, :, :, None] == full_rows[:, :, None]).all(-1)  # [B, Hkv, N, S]
    require(bool((equal.sum(-1) == 1).all()), "a cached row matches no full row, or several")
    positions = equal.int().argmax(-1)
    require(bool((positions.sort(-1).values.diff(dim=-1) > 0).all()), "a position was kept twice")
    return positions


def by_position(states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rows in position order."""
    return states.gather(2, positions.argsort(-1)[..., None].expand_as(states))


def copied(cache: Any) -> DynamicCache:
    """Copy a cache: a forward call appends to the one it is given."""
    copy = DynamicCache()
    for layer, entries in enumerate(cache.layers):
        copy.update(entries.keys.clone(), entries.values.clone(), layer)
    return copy


def answer(model: PreTrainedModel, cache: DynamicCache, question: torch.Tensor, first: int) -> torch.Tensor:
    """Logits after each question token, one token a call at its position.

    Under sdpa a single token gets no mask in a full-attention layer: it sees everything cached.
    Several tokens in one call would get one that is made from the length of layer 0, which is
    wrong where layers differ in length. Sliding layers are whole, so theirs is right.
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
    first: int,
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
            _module: torch.nn.Module, args: Any, kwargs: dict[str, Any], mask: torch.Tensor = mask
        ) -> tuple[Any, dict[str, Any]]:
            return args, {**kwargs, "attention_mask": mask}

        hooks.append(decoder_layer.self_attn.register_forward_pre_hook(with_mask, with_kwargs=True))
    position_ids = torch.arange(first, first + new).expand(batch, -1)
    try:
        out = model(question, position_ids=position_ids, past_key_values=copied(full))
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
        full, prefill_logits = self.prefill(self.ids)
        self.methods = [m for m in context.methods if m.runs(context.arch, dtype_name)]
        # Rounding only: the two paths add up the same numbers in a different order.
        self.tolerance = 2e-5 if dtype == torch.float32 else 0.25
        self.worst_difference = 0.0
        self.tensors: dict[str, Any] = {
            "input_ids": self.ids,
            "question_ids": self.question,
            "prefill_logits": prefill_logits[:, 0],
        }
        self.metadata: dict[str, Any] = {
            "arch": context.arch,
            "dtype": dtype_name,
            "seed": SEED,
            "weights": weights_checksum(self.model),
            "num_layers": len(full.layers),
            "pressed_layers": self.pressed,
            "versions": {name: version(name) for name in ("kvpress", "transformers", "torch")},
            "cases": [],
        }
        for layer, entries in enumerate(full.layers):
            self.tensors[f"full_keys.{layer}"] = entries.keys
            self.tensors[f"full_values.{layer}"] = entries.values
        self.tensors["question_logits.none"] = self.ask("none", full, full, {}, self.question, context.length)

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

    def prefill(self, ids: torch.Tensor) -> tuple[Any, torch.Tensor]:
        """The whole cache, and the logits after the last token.

        A DynamicCache without a config keeps sliding layers whole; the window is in the mask.
        """
        cache = DynamicCache()
        return cache, self.model(ids, past_key_values=cache, logits_to_keep=1).logits

    def add(self, method: Method, ratio: float | None) -> None:
        """Run one method at one ratio and store what it did."""
        case = method.label if ratio is None else f"{method.label}@{ratio}"
        record: dict[str, Any] = {"name": case, "label": method.label, "press": method.press.name}
        record |= {"kwargs": method.press.options} if not method.press.parts else {}
        record |= {"ratio": ratio, "patched": self.is_patched(method)}
        if self.context.methods is not METHODS:
            record["spec"] = method.press.described()
        rows = self.ids.split(1) if method.by_row else (self.ids,)
        questions = self.question.split(len(rows[0]))
        found = [self.of_rows(method, ratio, case, *each) for each in zip(rows, questions, strict=True)]
        tensors = {name: torch.cat([each[0][name] for each in found]) for name in found[0][0]}
        scores = {layer: torch.cat([each[1].scores[layer] for each in found]) for layer in found[0][1].scores}
        self.tensors |= tensors
        if method.decided_by and not method.counts_only:
            record["scores"] = self.store_scores(method, case, scores)
            record["score_dtype"] = str(scores[max(scores)].dtype).removeprefix("torch.")
        self.metadata["cases"].append(record)

    def is_patched(self, method: Method) -> bool:
        """Whether kvpress had to be told the layer type."""
        names = {method.press.name, *(part.name for part in method.press.parts)}
        return self.context.arch == "gemma3_text" and not names.isdisjoint(ROTATING)

    def of_rows(
        self, method: Method, ratio: float | None, case: str, ids: torch.Tensor, question: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor], Outcome]:
        """What the method did to these rows of the batch."""
        with kvpress_side.attention(self.model, method.eager):
            full, logits = self.prefill(ids)
            out = kvpress_side.run(method, ratio, self.model, ids)
        require(torch.equal(logits, out.logits), f"{case}: the prefill's logits changed")
        require(set(out.scores) <= set(self.pressed), f"{case}: layers {sorted(out.scores)} were pressed")
        tensors, kept, changed = {}, {}, copied(full)
        for layer, entries in enumerate(out.cache.layers):
            positions = matched_positions(entries, full.layers[layer], method.found_by)
            if layer not in self.pressed:
                require(positions.shape[-1] == self.context.length, f"{case}: {layer} was pressed")
                continue
            kept[layer] = positions.sort(-1).values
            tensors[f"kept.{case}.{layer}"] = kept[layer].to(torch.int16)
            for part in ("keys", "values"):
                states = getattr(entries, part)
                getattr(changed.layers[layer], part).scatter_(2, positions[..., None].expand_as(states), states)
                if part in method.stores:
                    tensors[f"{part}.{case}.{layer}"] = by_position(states, positions)
        if not method.counts_only:
            first = kept[self.pressed[0]].shape[-1] if method.rerotates else self.context.length
            name = f"question_logits.{case}"
            tensors[name] = self.ask(case, out.cache, changed, kept, question, first)
        return tensors, out

    def store_scores(self, method: Method, case: str, scores: dict[int, torch.Tensor]) -> str:
        """Store the scores, once where they are the same for all ratios; return their name."""
        name = f"scores.{case if method.scores_depend_on_ratio else method.label}"
        for layer, values in scores.items():
            stored = self.tensors.setdefault(f"{name}.{layer}", values.float())
            require(torch.equal(stored, values.float()), f"{case}: scores depend on the ratio")
        return name

    def ask(
        self,
        case: str,
        cache: Any,
        changed: Any,
        kept: dict[int, torch.Tensor],
        question: torch.Tensor,
        first: int,
    ) -> torch.Tensor:
        """The question's logits, after comparing them with the dense-mask computation."""
        logits = answer(self.model, copied(cache), question, first)
        expected = answer_by_mask(self.model, changed, kept, question, first)
        difference = (logits.float() - expected.float()).abs().max().item()
        require(difference <= self.tolerance, f"{case}: logits off by {difference}")
        self.worst_difference = max(self.worst_difference, difference)
        return logits


@torch.no_grad()
def build(context: Context, dtype: str) -> Builder:
    """Run every method at every ratio on one context."""
    builder = Builder(context, dtype)
    for method in builder.methods:
        for ratio in method.ratios:
            builder.add(method, ratio)
    return builder


def main() -> None:
    """Write the fixtures that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent / "fixtures")
    parser.add_argument("--arch", choices=ARCHITECTURES, action="append", help="default: all")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), action="append", help="default: both")
    parser.add_argument("--tag", action="append", help="the end of a file's name; default: all")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the order of a sum must not depend on the machine's core count
    logging.getLogger("kvpress").setLevel(logging.ERROR)  # Gemma3's text-only class is "not tested"
    console = Console()
    args.output.mkdir(parents=True, exist_ok=True)
    total = 0
    for context in CONTEXTS:
        if (args.arch and context.arch not in args.arch) or (args.tag and context.tag not in args.tag):
            continue
        for dtype in context.dtypes:
            if args.dtype and dtype not in args.dtype:
                continue
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
