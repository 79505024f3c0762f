"""kvpress at work: its presses from our specs, our random numbers in its hands, what it did to a cache."""

from __future__ import annotations

import contextlib
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kvpress
import torch
from kvpress.presses import cur_press, kvzap_press, leverage_press, random_press
from torch import nn
from transformers import DynamicCache, PreTrainedModel

sys.path.extend(str(Path(__file__).resolve().parents[i]) for i in (0, 1, 2))  # methods, tiny_models, kvpass

from methods import DELIMITER, Method, Spec, learned, shape_of

from kvpass.press_inputs import PressInputs
from kvpass.presses.noise import MODULUS, normal, uniform

CLASSES = {
    "random": "RandomPress",
    "knorm": "KnormPress",
    "streaming_llm": "StreamingLLMPress",
    "snapkv": "SnapKVPress",
    "tova": "TOVAPress",
    "expected_attention": "ExpectedAttentionPress",
    "expected_attention_stats": "ExpectedAttentionStatsPress",
    "pyramidkv": "PyramidKVPress",
    "observed_attention": "ObservedAttentionPress",
    "qfilter": "QFilterPress",
    "keydiff": "KeyDiffPress",
    "lagkv": "LagKVPress",
    "cur": "CURPress",
    "cap": "CapPress",
    "leverage": "LeverageScorePress",
    "non_causal_attention": "NonCausalAttnPress",
    "compactor": "CompactorPress",
    "kvzap": "KVzapPress",
    "think": "ThinKPress",
    "simlayerkv": "SimLayerKVPress",
    "finch": "FinchPress",
    "criticalkv": "CriticalKVPress",
    "chunk": "ChunkPress",
    "chunkkv": "ChunkKVPress",
    "entropy_gated_chunkkv": "EntropyGatedChunkKVPress",
    "block": "BlockPress",
    "key_rerotation": "KeyRerotationPress",
    "merging": "MergingPress",
    "per_layer": "PerLayerCompressionPress",
    "composed": "ComposedPress",
}


def build(spec: Spec, ratio: float | None, model: PreTrainedModel) -> Any:
    """The press of kvpress; our option `seed` is for `our_numbers`."""
    made = getattr(kvpress, CLASSES[spec.name])
    options = {key: value for key, value in spec.options.items() if key != "seed" or spec.name == "random"}
    if spec.name == "composed":
        return made([build(*part, model) for part in zip(spec.parts, options["ratios"], strict=True)])
    if spec.name == "per_layer":
        return made(build(spec.parts[0], 0.0, model), list(options["compression_ratios"]))
    if spec.parts:
        return made(build(spec.parts[0], ratio, model), **options)
    press = made(**options) if ratio is None else made(compression_ratio=ratio, **options)
    if spec.name == "finch":
        press.delimiter_token_id = DELIMITER
    if assets := learned(spec.name, options, shape_of(model.config)):
        give(press, assets, options, model)
    return press


def give(press: Any, assets: dict[str, torch.Tensor], options: dict[str, Any], model: PreTrainedModel) -> None:
    """Set what the press would load from the hub, in the model's dtype as it would."""
    press.post_init_from_model = lambda _model: None
    if "q_filters" in assets:
        press.q_filters = assets["q_filters"].to(model.dtype)
    elif "query_mean" in assets:
        press.mu, press.cov = assets["query_mean"].to(model.dtype), assets["query_cov"].to(model.dtype)
    else:
        shape = shape_of(model.config)
        hidden = assets["layers.0.0.weight"].shape[0] if options["model_type"] == "mlp" else None
        config = kvzap_press.KVzapConfig(
            input_dim=shape["hidden_size"],
            output_dim=shape["kv_heads"],
            n_modules=shape["layers"],
            hidden_dim=hidden,
        )
        press.kvzap_model = kvzap_press.KVzapModel(config)
        press.kvzap_model.load_state_dict(assets)


class OurNumbers:
    """Stands for torch in a module of kvpress: the same, but random numbers are those of kvpass for `layer`."""

    def __init__(self, heads: int, seed: int) -> None:
        self.layer, self.seed, self.heads = 0, seed, heads

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def _inputs(self) -> PressInputs:
        return PressInputs({"keys": torch.zeros(1, self.heads, 1, 1)}, layer=self.layer)

    def randn(self, *shape: int, dtype: torch.dtype, device: Any) -> torch.Tensor:
        """Leverage asks for [B, Hkv, D, k], CUR for [D, 20]."""
        numbers = normal(self._inputs(), *shape[-2:], self.seed).to(dtype)
        return numbers.expand(shape) if len(shape) == 4 else numbers[0]

    def rand(self, *shape: int, dtype: torch.dtype, **_: Any) -> torch.Tensor:
        """[B, Hkv, S]"""
        return (uniform(self._inputs(), shape[-1], self.seed) / MODULUS).to(dtype).expand(shape)


def seed_of(spec: Spec) -> int:
    return int(spec.options.get("seed", 0))


@contextlib.contextmanager
def our_numbers(method: Method, model: PreTrainedModel) -> Iterator[OurNumbers]:
    """Let kvpress draw the numbers that kvpass draws, except where only the counts are compared."""
    numbers = OurNumbers(int(model.config.num_key_value_heads), seed_of(method.press))
    modules = [] if method.counts_only else [cur_press, leverage_press, random_press]
    for module in modules:
        module.torch = numbers
    try:
        yield numbers
    finally:
        for module in modules:
            module.torch = torch


class FullAttentionRotary(nn.Module):
    """Gemma3's rotary module with the layer type filled in, callable as kvpress calls it."""

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        """Cos and sin for the positions."""
        return self.rotary(x, position_ids, layer_type="full_attention")


def pressed_layers(model: PreTrainedModel) -> list[int]:
    """Layers that a press may compress: those that attend to the whole text."""
    count = int(model.config.num_hidden_layers)
    types = getattr(model.config, "layer_types", None) or ["full_attention"] * count
    return [layer for layer in range(count) if types[layer] == "full_attention"]


def scorer_of(spec: Spec, press: Any) -> Any:
    """Whose score decides; None if there is no such thing."""
    if spec.name in ("composed", "block", "think", "simlayerkv"):
        return None
    return press.press if spec.parts and spec.name != "criticalkv" else press


@dataclass
class Outcome:
    """What one prefill under a press left."""

    cache: DynamicCache
    logits: torch.Tensor
    scores: dict[int, torch.Tensor]


def run(method: Method, ratio: float | None, model: PreTrainedModel, ids: torch.Tensor) -> Outcome:
    """Prefill under the method, on the layers that may be pressed."""
    press = build(method.press, ratio, model)
    layers = pressed_layers(model)
    if method.question:
        mark = torch.full_like(ids[:, :1], DELIMITER)
        ids = torch.cat([ids[:, : -method.question], mark, ids[:, -method.question :]], dim=1)
    all_scores: dict[int, list[torch.Tensor]] = defaultdict(list)
    scorer, hook = scorer_of(method.press, press), press.forward_hook
    if scorer is not None:
        score = scorer.score

        def recording_score(module: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            scores: torch.Tensor = score(module, *args, **kwargs)
            all_scores[module.layer_idx].append(scores.clone())
            return scores

        scorer.score = recording_score
    cache = DynamicCache()
    with our_numbers(method, model) as numbers:

        def selective_hook(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
            numbers.layer = module.layer_idx
            return hook(module, args, kwargs, output) if module.layer_idx in layers else output

        press.forward_hook = selective_hook
        with press(model):
            if model.config.model_type == "gemma3_text":
                for layer in layers:
                    model.model.layers[layer].self_attn.rotary_emb = FullAttentionRotary(model.model.rotary_emb)
            logits = model(ids, past_key_values=cache, logits_to_keep=1).logits
    for decoder_layer in model.model.layers:
        del decoder_layer.self_attn.rotary_emb  # kvpress leaves it there
    # A chunk after the other was scored: side by side they are the scores of the text.
    return Outcome(cache, logits, {layer: torch.cat(parts, -1) for layer, parts in all_scores.items()})


@contextlib.contextmanager
def attention(model: PreTrainedModel, eager: bool) -> Iterator[None]:
    """Some methods read weights that only the eager implementation returns."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager" if eager else before)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
