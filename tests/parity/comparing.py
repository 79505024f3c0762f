"""What "the same" means: kept pairs outside ties, tensors within a bound."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from reference import Reference


def as_mask(positions: torch.Tensor, length: int) -> torch.Tensor:
    """Turn positions [B, Hkv, N] into a mask [B, Hkv, length]."""
    mask = torch.zeros(*positions.shape[:2], length, dtype=torch.bool)
    return mask.scatter_(2, positions, value=True)


@dataclass(frozen=True)
class Selection:
    """What the reference selected in one layer, and how clearly."""

    is_kept: torch.Tensor  # [B, Hkv, S]
    weakest_kept: torch.Tensor  # [B, Hkv, 1]: the selection threshold
    strongest_dropped: torch.Tensor  # [B, Hkv, 1]
    spread: torch.Tensor  # [B, Hkv, 1]: the size of the scores where their own may be near 0

    @classmethod
    def of(cls, kept: torch.Tensor, scores: torch.Tensor) -> Selection:
        """Divide ``scores`` [B, Hkv, S] by the kept positions [B, Hkv, N]."""
        is_kept = as_mask(kept, scores.shape[-1])
        weakest = scores.masked_fill(~is_kept, float("inf")).amin(-1, keepdim=True)
        strongest = scores.masked_fill(is_kept, float("-inf")).amax(-1, keepdim=True)
        # Marks (the greatest number of the dtype, one more than the greatest) are no scores.
        spread = scores.abs().quantile(0.5, dim=-1, keepdim=True)
        return cls(is_kept, weakest, strongest, spread)

    def margin(self, ties: float, signed: bool = False) -> torch.Tensor:
        """What lies so near to the threshold may be on either side of it."""
        size = self.weakest_kept.abs()
        return ties * (torch.maximum(size, self.spread) if signed else size)

    def decided(self, ties: float, *, signed: bool = False) -> bool:
        """Whether no row can differ by rounding."""
        gap = self.weakest_kept - self.strongest_dropped
        return bool((gap > self.margin(ties, signed)).all())


def compare_kept(
    ours: torch.Tensor,
    kept: torch.Tensor,
    scores: torch.Tensor,
    ties: float,
    strays: float = 1.0,
    *,
    signed: bool = False,
) -> int:
    """Fail unless ``ours`` is the reference's selection outside ties; count rows that differ.

    ``ours`` and ``kept`` are positions [B, Hkv, N], ``scores`` the reference's [B, Hkv, S].
    """
    check_positions(ours, kept.shape, scores.shape[-1])
    selection = Selection.of(kept, scores)
    is_ours = as_mask(ours, scores.shape[-1])
    extra, missing = is_ours & ~selection.is_kept, selection.is_kept & ~is_ours
    margin = selection.margin(ties, signed)
    wrong = extra & (scores < selection.weakest_kept - margin)
    wrong |= missing & (scores > selection.strongest_dropped + margin)
    # Equal scores (of an observation window that does not fit, say) say nothing about any entry.
    exact_tie = selection.weakest_kept == selection.strongest_dropped
    too_many = missing.sum(-1, keepdim=True) > 1 + int(strays * kept.shape[-1])
    wrong |= too_many & ~exact_tie & (extra | missing)
    if bool(wrong.any()):
        row = tuple(wrong.any(-1).nonzero()[0].tolist())
        lines = [f"{int(wrong.any(-1).sum())} of {wrong[..., 0].numel()} rows differ; first {row}:"]
        for name, mask in (("extra", extra[row]), ("missing", missing[row])):
            positions = mask.nonzero().flatten().tolist()
            lines.append(f"{name} positions {positions}, scores {scores[row][mask].tolist()}")
        lines.append(f"weakest kept score {selection.weakest_kept[row].item()}")
        lines.append(f"strongest dropped score {selection.strongest_dropped[row].item()}")
        raise AssertionError("\n".join(lines))
    return int(missing.any(-1).sum())


def check_positions(positions: torch.Tensor, shape: torch.Size, length: int) -> None:
    """Fail unless ``positions`` has this shape and holds ascending positions below ``length``."""
    assert positions.shape == shape, f"kept {tuple(positions.shape)}, reference {tuple(shape)}"
    assert bool((positions.diff(dim=-1) > 0).all()), "positions are not ascending"
    if positions.numel():
        assert int(positions.min()) >= 0, "a position is negative"
        assert int(positions.max()) < length, "a position lies behind the context"


def assert_close(ours: torch.Tensor, expected: torch.Tensor, atol: float, what: str) -> None:
    """Compare by absolute difference."""
    assert ours.shape == expected.shape, f"{what}: {tuple(ours.shape)}, not {tuple(expected.shape)}"
    assert ours.dtype == expected.dtype, f"{what}: {ours.dtype}, not {expected.dtype}"
    if not ours.numel():
        return
    difference = (ours.float() - expected.float()).abs().max().item()
    assert difference <= atol, f"{what}: off by {difference:.2e}, allowed {atol:.0e}"


def rows_at(full: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Gather rows of [B, Hkv, S, D] at positions [B, Hkv, N]."""
    return full.gather(2, positions[..., None].expand(-1, -1, -1, full.shape[-1]))


def compare_entries(ref: Reference, cache: Any, layer: int) -> bool:
    """Compare cached keys and values with the full ones; return whether the keys are bit-equal."""
    positions = cache.positions(layer).long()
    full_keys, full_values = (rows_at(full, positions) for full in ref.full(layer))
    keys, values = cache.keys(layer), cache.values(layer)
    assert_close(keys, full_keys, ref.tolerance.entries, f"keys of layer {layer}")
    assert_close(values, full_values, ref.tolerance.entries, f"values of layer {layer}")
    return torch.equal(keys, full_keys)


def compare_unpressed(ref: Reference, cache: Any, layer: int, reach: int) -> None:
    """Fail unless an unpressed layer holds the last ``reach`` positions, whatever the press."""
    compare_entries(ref, cache, layer)
    length = ref.tensors["input_ids"].shape[1]
    is_cached = as_mask(cache.positions(layer).long(), length)
    assert bool(is_cached[..., -reach:].all()), f"layer {layer} lost an entry inside its window"
