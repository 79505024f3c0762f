"""Values that span what the others do not, weighted by what queries look for. https://arxiv.org/abs/2604.25975"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvpass.errors import PressError
from kvpass.press import ScorerPress
from kvpass.press_inputs import PressInputs
from kvpass.presses.expected_attention import mean_rotation
from kvpass.registry import register_press
from kvpass.selection import protect


@register_press("cap")
@dataclass(frozen=True)
class Cap(ScorerPress):
    """Keeps values with a large share in the capacity of the attention output.

    Keys are weighted by exp(`tau` * cosine to the mean future query); the score is the weighted leverage of a value
    in I + sum (w + `epsilon`) v v^T, the derivative of its log-determinant. The first `n_sink` tokens are kept.
    """

    tau: float = 5.0
    n_future_positions: int = 512
    n_sink: int = 4
    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        if self.n_future_positions < 1 or self.n_sink < 0:
            raise PressError(
                f"cap: n_future_positions={self.n_future_positions}, n_sink={self.n_sink}; expected at least 1 and "
                "at least 0"
            )

    @property
    def min_tokens(self) -> int:
        return max(2, self.n_sink + 1)

    def score(self, x: PressInputs) -> Tensor:
        queries = x.queries_pre_rope[:, :, self.n_sink :]
        keys, values = x.keys[:, :, None, self.n_sink :], x.values[:, :, None, self.n_sink :]  # [B, Hkv, 1, S', D]
        anchor = queries.mean(dim=2, keepdim=True) @ mean_rotation(x, self.n_future_positions)
        direction = x.per_kv_head(F.normalize(anchor, dim=-1))  # [B, Hkv, G, 1, D]
        cosine = (F.normalize(keys, dim=-1) * direction).sum(dim=-1).clamp(-1, 1)
        logits = self.tau * cosine
        weight = (logits - logits.amax(dim=-1, keepdim=True)).exp()  # [B, Hkv, G, S']
        scaled = values * (weight + self.epsilon).sqrt()[..., None]
        unit = torch.eye(int(values.shape[-1]), dtype=values.dtype, device=values.device)
        capacity = (unit + scaled.transpose(-1, -2) @ scaled).to(torch.float32)
        columns = values.to(torch.float32).transpose(-1, -2).expand(*scaled.shape[:3], -1, -1)
        leverage = (columns * torch.linalg.solve(capacity, columns)).sum(dim=-2)
        return protect((weight * leverage).mean(dim=2), before=self.n_sink)
