"""Approximate leverage of keys times values. https://arxiv.org/abs/2509.15038"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvpass.errors import PressError
from kvpass.press import ScorerPress
from kvpass.press_inputs import PressInputs
from kvpass.presses.noise import normal
from kvpass.registry import register_press

SKETCH = 20  # columns of the random projection


@register_press("cur")
@dataclass(frozen=True)
class CUR(ScorerPress):
    """Keeps pairs whose key and value are large among their neighbours.

    Squared norms approximate leverage scores; they are divided by their sum over `local_window_size` neighbours, and
    those of keys and values combined as `leverage_type` says. The first `num_sinks` tokens are kept.
    `use_random_leverage` projects keys and values to 20 random directions first, drawn from `seed`.
    """

    num_sinks: int = 4
    leverage_type: Literal["key", "value", "kv_avg", "kv_product"] = "kv_product"
    use_random_leverage: bool = False
    use_local_approximation: bool = True
    local_window_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if self.leverage_type not in ("key", "value", "kv_avg", "kv_product"):
            raise PressError(f"cur: leverage_type={self.leverage_type!r}, expected key, value, kv_avg or kv_product")
        if self.num_sinks < 0 or self.local_window_size < 1:
            raise PressError(
                f"cur: num_sinks={self.num_sinks}, local_window_size={self.local_window_size}; expected at least 0 "
                "and at least 1"
            )

    @property
    def min_tokens(self) -> int:
        return max(2, self.num_sinks + 1)

    def score(self, x: PressInputs) -> Tensor:
        keys, values = x.keys, x.values
        if self.use_random_leverage:
            sketch = normal(x, int(keys.shape[3]), SKETCH, self.seed)[:1].to(keys.dtype) / SKETCH**0.5
            keys, values = keys @ sketch, values @ sketch
        key, value = self._leverage(keys), self._leverage(values)
        combined = {"key": key, "value": value, "kv_avg": (key + value) / 2, "kv_product": key * value}
        scores = combined[self.leverage_type]
        scores = scores / scores.sum(dim=-1, keepdim=True)
        return torch.cat([torch.ones_like(scores[..., : self.num_sinks]), scores[..., self.num_sinks :]], dim=-1)

    def _leverage(self, states: Tensor) -> Tensor:
        norms = states.pow(2).sum(dim=-1)  # [B, Hkv, S]
        if not self.use_local_approximation:
            return norms
        size, tokens = self.local_window_size, norms.shape[-1]
        windows = (tokens + size - 1) // size
        rest = norms.new_zeros(*norms.shape[:2], windows * size - tokens)
        local = torch.cat([norms, rest], dim=-1).unflatten(-1, (windows, size))
        total = local.sum(dim=-1, keepdim=True)
        shares: Tensor = (local / torch.where(total == 0, 1, total)).flatten(2, 3)[..., :tokens]
        return shares
