"""Attention inside chunks without a causal mask. https://arxiv.org/abs/2507.08143"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvpass.errors import PressError
from kvpass.press import ScorerPress
from kvpass.press_inputs import PressInputs
from kvpass.presses.leverage import standardised
from kvpass.presses.window_attention import smooth
from kvpass.registry import register_press


@register_press("non_causal_attention")
@dataclass(frozen=True)
class NonCausalAttention(ScorerPress):
    """Keeps what the tokens around it attend to, also those before it.

    The score is the attention that a key receives from all queries of its chunk of `chunk_size` tokens, without mask
    and without scale, times the norm of its value, smoothed over 3 neighbours and standardised over the row. The last
    chunk is filled up with zeros, which take part. Extra memory: B * H * S * chunk_size weights in float32.
    """

    needs_all_queries = True

    chunk_size: int = 256

    def __post_init__(self) -> None:
        if self.chunk_size < 1:
            raise PressError(f"non_causal_attention: chunk_size={self.chunk_size}, expected at least 1")

    @property
    def example_tokens(self) -> int:
        """More than one chunk: where there is one, torch takes it that there always is."""
        return 2 * (self.min_tokens + self.chunk_size) + 61

    def score(self, x: PressInputs) -> Tensor:
        tokens = x.keys.shape[2]
        queries = x.per_kv_head(self._chunks(x.queries))  # [B, Hkv, G, P, c, D]
        keys = self._chunks(x.keys)[:, :, None]
        weights = (queries @ keys.transpose(-1, -2)).softmax(dim=-1, dtype=torch.float32)
        received = weights.sum(dim=-2).flatten(3, 4)[..., :tokens].mean(dim=2)
        scores = received * torch.linalg.vector_norm(x.values, dim=-1)
        return standardised(smooth(scores, 3))

    def _chunks(self, states: Tensor) -> Tensor:
        """[B, heads, S, D] -> [B, heads, P, chunk_size, D]"""
        batch, heads, tokens, width = states.shape
        chunks = (tokens + self.chunk_size - 1) // self.chunk_size
        # A whole chunk of zeros, though fewer are needed: torch.export takes it that no size that varies is 0.
        padded = torch.cat([states, states.new_zeros(batch, heads, self.chunk_size, width)], dim=2)
        folded: Tensor = padded.narrow(2, 0, chunks * self.chunk_size).unflatten(2, (chunks, self.chunk_size))
        return folded
