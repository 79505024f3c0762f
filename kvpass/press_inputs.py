"""What a press may read of one layer.

Legend: B batch, H query heads, Hkv KV heads, G = H / Hkv, S tokens of the prompt, D head size, N pairs to keep.
"""

from collections.abc import Collection, Mapping
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from kvpass.errors import MissingTapError

Frequencies = tuple[Tensor, ...]


class Rope(Protocol):
    """The model's own rotary embedding, at any position."""

    def frequencies(self, positions: Tensor) -> Frequencies:
        """The tensors that the model rotates with (cos and sin, say) at positions i64[B or 1, P]."""

    def average(self, frequencies: Frequencies) -> Frequencies:
        """Their mean over the P positions, in their own dtype."""

    def rotate(self, states: Tensor, frequencies: Frequencies) -> Tensor:
        """Rotate states [B, heads, P or any, D]; linear in both arguments."""


class PressInputs:
    """Reading a field is what makes it a tap of the graph.

    Runs on real tensors too: `PressInputs({"keys": k, "values": v}, sizes={"budget": 50})`.
    Every field raises `MissingTapError` if the layer does not have it.

    taps: tensors by name, or the error that says why the layer lacks one. rope, key_rope: the rotations of queries
    and of keys. sizes, scalars: what `Press.sizes` and `Press.scalars` counted for the prompt.
    """

    def __init__(
        self,
        taps: Mapping[str, Tensor | MissingTapError],
        *,
        rope: Rope | MissingTapError | None = None,
        key_rope: Rope | MissingTapError | None = None,
        sizes: Mapping[str, int] | None = None,
        scalars: Mapping[str, Tensor] | None = None,
        scale: float | None = None,
        layer: int = 0,
        layers: int = 1,
        next_position: int | None = None,
        positions: Tensor | None = None,
    ) -> None:
        self._fields: dict[str, Any] = {
            "rope": rope,
            "key_rope": key_rope,
            "sizes": sizes or {},
            "scalars": scalars or {},
            "scale": scale,
            "layer": layer,
            "layers": layers,
            "next_position": next_position,
            "positions": positions,
        }
        self._taps = taps
        self._reads: set[str] = set()

    def replace(
        self,
        taps: Mapping[str, Tensor | MissingTapError] | None = None,
        *,
        only: Collection[str] | None = None,
        **fields: Any,
    ) -> Self:
        """The same layer with other tensors or fields, `only` some of the tensors; what is read is noted here too."""
        known = {name: tap for name, tap in self._taps.items() if only is None or name in only}
        twin = type(self)({**known, **(taps or {})}, **{**self._fields, **fields})
        twin._reads = self._reads
        return twin

    def part(self, prefix: str) -> Self:
        """What a wrapper shows a press inside it: sizes, scalars and assets whose names begin with `prefix`."""
        sizes, scalars = (
            {name.removeprefix(prefix): value for name, value in group.items() if name.startswith(prefix)}
            for group in (self._fields["sizes"], self._fields["scalars"])
        )
        assets = {
            f"asset.{name.removeprefix(f'asset.{prefix}')}": tap
            for name, tap in self._taps.items()
            if name.startswith(f"asset.{prefix}")
        }
        return self.replace(assets, sizes=sizes, scalars=scalars)

    def _tap(self, name: str) -> Tensor:
        self._note(name)
        found = self._taps.get(name)
        if found is None:
            raise MissingTapError(
                f"layer {self._fields['layer']}: the press reads {name!r}, given are {sorted(self._taps)}"
            )
        if isinstance(found, MissingTapError):
            raise found
        return found

    def _note(self, name: str) -> None:
        # The body of a loop is traced by torch.compile, which allows no such thing; loops read outside as well.
        if not torch.compiler.is_dynamo_compiling():
            self._reads.add(name)

    @property
    def taps(self) -> Mapping[str, Tensor | MissingTapError]:
        """All tensors by name, for wrappers that hand on a part of them. Reads none."""
        return self._taps

    @property
    def reads(self) -> frozenset[str]:
        """What was read so far."""
        return frozenset(self._reads)

    @property
    def layer(self) -> int:
        """The index of this layer among all `layers`."""
        self._note("layer")
        return int(self._fields["layer"])

    @property
    def layers(self) -> int:
        """How many layers the model has."""
        return int(self._fields["layers"])

    @property
    def keys(self) -> Tensor:
        """Keys as cached, after RoPE. [B, Hkv, S, D]"""
        return self._tap("keys")

    @property
    def values(self) -> Tensor:
        """Values as cached. [B, Hkv, S, D]"""
        return self._tap("values")

    @property
    def queries(self) -> Tensor:
        """Queries as attention reads them, after RoPE. [B, H, S, D]"""
        return self._tap("queries")

    @property
    def queries_pre_rope(self) -> Tensor:
        """Queries before RoPE, behind their norm if the model has one. [B, H, S, D]"""
        return self._tap("queries_pre_rope")

    @property
    def keys_pre_rope(self) -> Tensor:
        """Keys before RoPE, behind their norm if the model has one. [B, Hkv, S, D]"""
        return self._tap("keys_pre_rope")

    @property
    def hidden_states(self) -> Tensor:
        """What the query projection reads: the layer's normed input. [B, S, D_model]"""
        return self._tap("hidden_states")

    @property
    def output_weight(self) -> Tensor:
        """The weight of the projection behind attention; head h owns columns h * D to (h + 1) * D. [D_model, H * D]"""
        return self._tap("output_weight")

    def asset(self, name: str) -> Tensor:
        """This layer's part of a learned tensor that the press loaded (`Press.assets`), in the model's dtype."""
        return self._tap(f"asset.{name}")

    @property
    def rope(self) -> Rope:
        """The rotation between `queries_pre_rope` and `queries`; the identity in layers without RoPE."""
        return self._rotation("rope")

    @property
    def key_rope(self) -> Rope:
        """The rotation between `keys_pre_rope` and `keys`."""
        return self._rotation("key_rope")

    def _rotation(self, name: str) -> Rope:
        self._note(name)
        found: Rope | MissingTapError | None = self._fields[name]
        if found is None:
            raise MissingTapError(f"layer {self._fields['layer']}: the press reads {name!r}, none is given")
        if isinstance(found, MissingTapError):
            raise found
        return found

    @property
    def scale(self) -> float:
        """What attention multiplies the logits with."""
        scale = self._fields["scale"]
        return float(scale) if scale is not None else float(self.keys.shape[-1]) ** -0.5

    @property
    def budget(self) -> int:
        """N, how many pairs each KV head will keep; symbolic while tracing."""
        return self.size("budget")

    def size(self, name: str) -> int:
        """A number that `Press.sizes` counted for this prompt; symbolic while tracing."""
        found: Mapping[str, int] = self._fields["sizes"]
        if name not in found:
            raise MissingTapError(
                f"layer {self._fields['layer']}: the press reads size {name!r}, given are {sorted(found)}"
            )
        return found[name]

    @property
    def sizes(self) -> Mapping[str, int]:
        """All sizes by name."""
        found: Mapping[str, int] = self._fields["sizes"]
        return found

    def scalar(self, name: str) -> Tensor:
        """A number that `Press.scalars` computed for this prompt. f32[]"""
        found: Mapping[str, Tensor] = self._fields["scalars"]
        if name not in found:
            raise MissingTapError(
                f"layer {self._fields['layer']}: the press reads scalar {name!r}, given are {sorted(found)}"
            )
        return found[name]

    @property
    def scalars(self) -> Mapping[str, Tensor]:
        """All scalars by name."""
        found: Mapping[str, Tensor] = self._fields["scalars"]
        return found

    @property
    def next_position(self) -> int:
        """The position of the first token behind the prompt; S unless a wrapper shows only a part of the prompt."""
        given = self._fields["next_position"]
        return self.keys.shape[2] if given is None else given

    @property
    def positions(self) -> Tensor | None:
        """Which token each pair is, if some are missing; None: pair i is token i. i64[B, Hkv, S]"""
        found: Tensor | None = self._fields["positions"]
        return found

    def per_kv_head(self, per_query_head: Tensor) -> Tensor:
        """[B, H, ...] as [B, Hkv, G, ...]: consecutive query heads share a KV head."""
        heads = self.keys.shape[1]
        grouped: Tensor = per_query_head.unflatten(1, (heads, per_query_head.shape[1] // heads))
        return grouped

    def per_query_head(self, per_kv_head: Tensor) -> Tensor:
        """[B, Hkv, ...] as [B, H, ...], every head given G times."""
        groups = self.queries.shape[1] // per_kv_head.shape[1]
        return per_kv_head.repeat_interleave(groups, dim=1) if groups != 1 else per_kv_head


def tensors_of(taps: Mapping[str, Tensor | MissingTapError]) -> dict[str, Tensor]:
    """The taps that are there."""
    return {name: tap for name, tap in taps.items() if isinstance(tap, torch.Tensor)}
