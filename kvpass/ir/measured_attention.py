"""Measure what a written-out attention computes, with chosen numbers, and prove it with random ones."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from kvpass.ir.attention_op import attend, distance_bias
from kvpass.ir.attention_site import is_attention
from kvpass.ir.program import KVProgram, Role
from kvpass.ir.subgraph import Subgraph, argument
from kvpass.ir.symbols import Size
from kvpass.ir.written_attention import Layout, WrittenAttention, layout_of

BATCH, LENGTHS = 2, (5, 67)  # at which the proof is made
MASKED = -1000.0  # scores that lie further below the greatest one have no weight
EXACT = torch.float64


class NotAttentionError(Exception):
    """Why something that has the form of attention is none that can be cached."""


@dataclass(frozen=True)
class Measured:
    """The numbers of one attention; sinks and slopes hold one for each query head."""

    scale: float
    softcap: float | None
    sinks: Tensor | None
    slopes: Tensor | None

    @property
    def plain(self) -> bool:
        return self.softcap is None and self.sinks is None and self.slopes is None


class Probe:
    """One written-out attention as a function of its states, in float64 whatever the model computes in."""

    def __init__(self, program: KVProgram, attention: WrittenAttention) -> None:
        self.program, self.attention = program, attention
        states = (attention.queries, attention.keys, attention.values)
        self.layouts = [_layout(program, node) for node in states]
        self.biased = is_attention(attention.softmax)
        self.result = _layout(program, attention.out, merged=True)
        self.whole = Subgraph(states, (attention.out,))
        self.logits = Subgraph(states[:2], (attention.scores,))
        if program.input_node(Role.INPUT_IDS) in (*self.whole.leaves(), *self.logits.leaves()):
            raise NotAttentionError("its mask or bias depends on the tokens, not only on their positions")
        self.heads, self.kv_heads, self.value_heads = (
            int(layout.restore(node.meta["val"]).shape[1]) for layout, node in zip(self.layouts, states, strict=True)
        )
        self.width, self.value_width = (int(node.meta["val"].shape[-1]) for node in (states[0], states[2]))

    def score(self, q: Tensor, k: Tensor, given: Mapping[Node, Tensor], sizes: Mapping[str, Size]) -> Tensor:
        """What the softmax is taken of: [B, H, S, S], one more column with sinks."""
        tensors = {
            self.attention.queries: self.layouts[0].place(q),
            self.attention.keys: self.layouts[1].place(k),
            **given,
        }
        (found,) = self.logits.run(tensors, sizes, dtype=q.dtype if q.dtype == EXACT else None)
        if self.biased:
            keys = k.repeat_interleave(self.heads // self.kv_heads, dim=1)
            found = q @ keys.transpose(2, 3) * self._scale() + found
        return found.reshape(q.shape[0], q.shape[1], q.shape[2], -1)

    def _scale(self) -> float:
        """The scale of an attention node."""
        scale = argument(self.attention.softmax, "scale")
        return float(scale) if isinstance(scale, int | float) else float(self.width) ** -0.5

    def allowed(self, q: Tensor, k: Tensor, given: Mapping[Node, Tensor], sizes: Mapping[str, Size]) -> Tensor:
        """Which keys have a chance, bool[B, H, S, S], at states that are all zero."""
        logits = self.score(q, k, given, sizes)[..., : q.shape[2]]
        return logits > logits.amax(-1, keepdim=True) + MASKED

    def measure(self) -> Measured:
        """Raises `NotAttentionError` if the numbers found do not explain what is computed."""
        with torch.no_grad():
            measured = self._read_out()
            for length in LENGTHS:
                self._prove(measured, min(length, self.program.max_tokens))
        return measured

    def _read_out(self) -> Measured:
        """One token that sees itself and the one before it tells scale, cap and slope; the first one the sinks."""
        still = self._pair(0.0)
        slopes = still[:, 1, 1] - still[:, 1, 0]
        changes = [(self._pair(product) - still)[0, 1] for product in (1.0, 1e6, 2e6)]
        one, far, further = (float(row[1] - row[0]) for row in changes)
        if abs(further - 2 * far) <= 1e-6 * abs(further):
            scale, softcap = one, None
        elif abs(further - far) <= 1e-9 * abs(far) and abs(one) < abs(far):
            softcap = _rounded(far)
            scale = float(softcap * torch.atanh(torch.tensor(one / softcap, dtype=EXACT)))
        else:
            raise NotAttentionError("its scores are neither proportional to the products nor capped by tanh")
        sinks = still[:, 0, 3] - still[:, 0, 0] if still.shape[-1] == 4 else None
        has_slopes = bool((slopes.abs() > 1e-12).any())
        return Measured(_rounded(scale), softcap, sinks, slopes if has_slopes else None)

    def _pair(self, product: float) -> Tensor:
        """Logits [H, 3, 3 or 4] of three tokens; the product of any query with key 1 is given, with others zero."""
        q, k = self._states(3, lambda *shape: torch.zeros(shape))[:2]
        q[..., 0], k[:, :, 1, 0] = 1.0, product
        logits = self.score(q, k, self._given(3), self._sizes(3))[0]
        if logits.shape[-1] not in (3, 4):
            raise NotAttentionError(f"the softmax of 3 tokens is over {logits.shape[-1]} entries")
        return logits

    def _prove(self, measured: Measured, length: int) -> None:
        generator = torch.Generator().manual_seed(length)
        q, k, v = self._states(length, lambda *shape: torch.randn(shape, generator=generator))
        given, sizes = self._given(length), self._sizes(length)
        mask = self.allowed(torch.zeros_like(q), torch.zeros_like(k), given, sizes)
        bias = None
        if measured.slopes is not None:
            position = torch.arange(length, device=q.device)
            bias = distance_bias(measured.slopes, position, position)
        sinks = None if measured.sinks is None else measured.sinks[:, None, None]
        keys, values = (t.repeat_interleave(self.heads // t.shape[1], dim=1) for t in (k, v))
        expected = attend(q, keys, values, mask, scale=measured.scale, softcap=measured.softcap, sinks=sinks, bias=bias)
        states = (self.attention.queries, self.attention.keys, self.attention.values)
        tensors = {node: layout.place(t) for node, layout, t in zip(states, self.layouts, (q, k, v), strict=True)}
        (found,) = self.whole.run({**tensors, **given}, sizes, dtype=EXACT)
        expected = self.result.place(expected)
        if found.shape != expected.shape or not torch.allclose(found, expected, atol=1e-5, rtol=1e-5):
            raise NotAttentionError(
                f"it does not compute softmax attention (scale {measured.scale:.6g}, soft-cap {measured.softcap}, "
                f"{'no' if sinks is None else 'with'} sinks, {'no' if bias is None else 'with'} slopes)"
            )

    def _states(self, length: int, make: Callable[..., Tensor]) -> list[Tensor]:
        device = self.attention.queries.meta["val"].device
        heads = (self.heads, self.kv_heads, self.value_heads)
        widths = (self.width, self.width, self.value_width)
        return [make(BATCH, h, length, w).to(device, EXACT) for h, w in zip(heads, widths, strict=True)]

    def _given(self, length: int) -> dict[Node, Tensor]:
        """What else is read: parameters, buffers and the positions."""
        given = {n: self.program.attribute(n) for n in self.whole.leaves() if n.op == "get_attr"}
        given = {n: t.to(EXACT) if t.is_floating_point() else t for n, t in given.items()}
        positions = self.program.input_node(Role.POSITION_IDS)
        given[positions] = torch.arange(length, device=positions.meta["val"].device).repeat(BATCH, 1)
        return given

    def _sizes(self, length: int) -> dict[str, Size]:
        return self.program.shapes.bind(B=BATCH, S=length)


def _layout(program: KVProgram, node: Node, merged: bool = False) -> Layout:
    found = layout_of(program, node, merged)
    assert found is not None
    return found


def _rounded(number: float) -> float:
    """Without the noise of the way it was found on."""
    return float(f"{number:.12g}")
