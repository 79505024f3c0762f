"""Keep what future queries are expected to attend to, in closed form. https://arxiv.org/abs/2510.00636"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvpass.errors import PressError
from kvpass.press import ScorerPress
from kvpass.press_inputs import PressInputs
from kvpass.registry import register_press
from kvpass.selection import protect


@register_press("expected_attention")
@dataclass(frozen=True)
class ExpectedAttention(ScorerPress):
    """Keeps what future queries are expected to attend to.

    Queries before RoPE are taken for normally distributed; RoPE is averaged over the next positions.

    The expectation of exp(q.k) then needs their mean and covariance alone (section 3 of the paper). Weighted by the
    norm of the value; the first `n_sink` tokens are outliers, left out of the statistics and kept.
    """

    n_future_positions: int = 512
    n_sink: int = 4
    use_covariance: bool = True
    use_vnorm: bool = True
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        if self.n_future_positions < 1 or self.n_sink < 0:
            raise PressError(
                f"expected_attention: n_future_positions={self.n_future_positions}, n_sink={self.n_sink}; expected "
                "at least 1 and at least 0"
            )

    @property
    def min_tokens(self) -> int:
        return max(2, self.n_sink + 1)

    def score(self, x: PressInputs) -> Tensor:
        keys, values = x.keys[:, :, self.n_sink :], x.values[:, :, self.n_sink :]
        rotation = mean_rotation(x, self.n_future_positions)
        mean, covariance = self.statistics(x)
        direction = x.per_kv_head(mean @ rotation).flatten(2, 3)  # [B, Hkv, G, D]
        logits = (direction @ keys.transpose(-1, -2)) * x.scale  # [B, Hkv, G, S']
        if covariance is not None:
            spread = x.per_kv_head(rotation.transpose(-1, -2) @ covariance @ rotation)
            grouped = keys.unsqueeze(2)
            logits = logits + ((grouped @ spread) * grouped).sum(dim=-1) * (x.scale**2 / 2)
        scores = logits.softmax(dim=-1).mean(dim=2)  # [B, Hkv, S']
        if self.use_vnorm:
            weighted = scores + self.epsilon if self.epsilon else scores
            scores = weighted * torch.linalg.vector_norm(values, dim=-1)
        return protect(scores, before=self.n_sink)

    def statistics(self, x: PressInputs) -> tuple[Tensor, Tensor | None]:
        """Mean [B, H, 1, D] and covariance [B, H, D, D] of the queries before RoPE; None: not used."""
        queries = x.queries_pre_rope[:, :, self.n_sink :]  # [B, H, S', D]
        mean = queries.mean(dim=2, keepdim=True)
        if not self.use_covariance:
            return mean, None
        centred = queries - mean
        return mean, centred.transpose(-1, -2) @ centred / queries.shape[2]


def mean_rotation(x: PressInputs, n_future_positions: int) -> Tensor:
    """The average of the rotations at the positions behind the prompt, as a matrix for row vectors. [D, D]"""
    width = x.keys.shape[3]
    positions = torch.arange(n_future_positions, device=x.keys.device)[None] + x.next_position
    frequencies = x.rope.average(x.rope.frequencies(positions))
    basis = torch.eye(width, dtype=x.keys.dtype, device=x.keys.device)
    return x.rope.rotate(basis[None, None], frequencies)[0, 0]
