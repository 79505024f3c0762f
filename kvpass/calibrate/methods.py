"""What is learned for each press, and how."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kvpass import CapturedModel, capture_model
from kvpass.calibrate.collect import Progress, collect
from kvpass.calibrate.moments import Moments
from kvpass.errors import InputError, PressError, UnsupportedModelError
from kvpass.ir.attention_site import attention_sites


@dataclass(frozen=True)
class Method:
    """How the tensors of one press come about."""

    tap: str  # what is gathered of every layer
    n_sink: int  # tokens at the beginning of each sample that are left out, unless said otherwise
    least: int  # vectors without which there is no result
    finish: Callable[[Sequence[Moments], int], dict[str, Tensor]]  # of the layers, and the number of KV heads


def _stats(layers: Sequence[Moments], kv_heads: int) -> dict[str, Tensor]:
    """Mean f32[L, H, D] and unbiased covariance f32[L, H, D, D]."""
    return {
        "query_mean": torch.stack([layer.mean for layer in layers]),
        "query_cov": torch.stack([layer.covariance for layer in layers]),
    }


def _filters(layers: Sequence[Moments], kv_heads: int) -> dict[str, Tensor]:
    """f32[L, Hkv, D]; not of length 1 where the query heads of a group look into different directions.

    The paper keeps keys with a large projection on the direction; the files of its authors hold the opposite
    direction, and so the press keeps keys with a small projection on what the file holds.
    """
    directions = torch.stack([layer.main_direction for layer in layers])
    return {"q_filters": -directions.unflatten(1, (kv_heads, -1)).mean(dim=2)}


METHODS: Mapping[str, Method] = {
    # Section 3 of https://arxiv.org/abs/2510.00636. Sink tokens are outliers that the press keeps unseen.
    "expected_attention_stats": Method("queries_pre_rope", n_sink=4, least=2, finish=_stats),
    # Section 3 of https://arxiv.org/abs/2503.02812. It estimates the logits with keys as they are cached, which are
    # behind RoPE: so are the queries. Nothing is left out.
    "qfilter": Method("queries", n_sink=0, least=1, finish=_filters),
}


def calibrate(
    model: nn.Module | CapturedModel,
    method: str,
    token_ids: Sequence[Tensor],
    *,
    n_sink: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Learn from samples of text what a press needs to know of a model; `save` writes it where the press reads it.

    method: "expected_attention_stats": mean `query_mean` f32[L, H, D] and unbiased covariance `query_cov`
        f32[L, H, D, D] of the queries before RoPE, behind their norm if the model has one; or "qfilter": `q_filters`
        f32[L, Hkv, D], the main direction of the queries behind RoPE, negated, averaged over the query heads of each
        KV head.
    token_ids: samples i64[S] or i64[B, S], read one after the other from position 0.
    n_sink: how many tokens at the beginning of each sample are left out; by default 4 for expected_attention_stats
        (give the press the same number) and 0 for qfilter.
    progress: is called behind every layer of every sample with the layers done and those to do.

    Raises `PressError` for an unknown method, `InputError` for samples that are missing, too short or too long,
    `MissingTapError` if a layer has no such queries, `UnsupportedModelError` if the model cannot be captured or its
    layers differ in their heads.
    """
    chosen = method_of(method)
    skip = chosen.n_sink if n_sink is None else n_sink
    if skip < 0:
        raise PressError(f"calibrate: n_sink={n_sink}, expected at least 0")
    captured = model if isinstance(model, CapturedModel) else capture_model(model)
    samples = [_checked(ids, i, skip, captured.max_tokens) for i, ids in enumerate(token_ids)]
    vectors = sum(ids.shape[0] * (ids.shape[1] - skip) for ids in samples)
    if vectors < chosen.least:
        raise InputError(
            f"calibrate: {len(samples)} samples with {vectors} tokens behind the first {skip} of each, {method} needs "
            f"at least {chosen.least}; give a longer text"
        )
    located = captured.graphs.located
    heads = {
        tuple(int(tap.meta["val"].shape[i]) for tap in (site.queries, site.keys) for i in (1, 3))
        for site in attention_sites(located)
    }
    if len(heads) != 1:
        raise UnsupportedModelError(
            f"calibrate: layers differ in query heads, head size, KV heads, key size ({sorted(heads)}); {method} "
            "stores one tensor for all layers"
        )
    ((_, _, kv_heads, _),) = heads
    found = chosen.finish(collect(located, chosen.tap, samples, skip, progress), kv_heads)
    return {name: tensor.to("cpu", torch.float32).contiguous() for name, tensor in found.items()}


def method_of(name: str) -> Method:
    """Raises `PressError` for a press that learns nothing."""
    if name not in METHODS:
        raise PressError(f"calibrate: there is no method {name!r}; known are {', '.join(METHODS)}")
    return METHODS[name]


def _checked(ids: Tensor, index: int, skip: int, max_tokens: int) -> Tensor:
    if ids.dim() not in (1, 2) or ids.dtype.is_floating_point:
        raise InputError(f"calibrate: sample {index} is {ids.dtype}{list(ids.shape)}, expected token ids [S] or [B, S]")
    ids = ids.reshape(-1, ids.shape[-1]).to(torch.int64)
    if not skip < ids.shape[1] <= max_tokens:
        raise InputError(
            f"calibrate: sample {index} has {ids.shape[1]} tokens, expected {skip + 1} (the first {skip} are left out) "
            f"to {max_tokens} (the longest text of this model)"
        )
    return ids
