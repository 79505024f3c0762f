"""Leverage and non-causal attention together. https://arxiv.org/abs/2507.08143"""

from dataclasses import dataclass

from torch import Tensor

from kvpass.budget import Prompt
from kvpass.errors import PressError
from kvpass.press import ScorerPress
from kvpass.press_inputs import PressInputs, tensors_of
from kvpass.presses.leverage import Leverage
from kvpass.presses.non_causal_attention import NonCausalAttention
from kvpass.registry import register_press

ALONG_TOKENS = ("keys", "values", "queries", "queries_pre_rope", "keys_pre_rope")


@register_press("compactor")
@dataclass(frozen=True)
class Compactor(ScorerPress):
    """Keeps keys that others do not explain, or that the tokens around them attend to.

    The score is `blending` * leverage + non_causal_attention, both standardised; `blending` is the ratio unless it is
    given. The first `sink_size_start` and the last `sink_size_end` tokens get the greatest score.
    """

    needs_all_queries = True

    sink_size_start: int = 8
    sink_size_end: int = 4
    chunk_size: int = 256
    sketch_dimension: int = 48
    blending: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.sink_size_start, self.sink_size_end) < 0:
            raise PressError(
                f"compactor: sink_size_start={self.sink_size_start}, sink_size_end={self.sink_size_end}; expected at "
                "least 0"
            )
        Leverage(self.sketch_dimension), NonCausalAttention(self.chunk_size)  # they say what is wrong

    @property
    def min_tokens(self) -> int:
        return max(2, self.sink_size_start + self.sink_size_end + 1)

    @property
    def example_tokens(self) -> int:
        return self.min_tokens + NonCausalAttention(self.chunk_size).example_tokens

    def scalars(self, prompt: Prompt) -> dict[str, float]:
        return {} if self.blending is not None else {"ratio": prompt.ratio}

    def score(self, x: PressInputs) -> Tensor:
        first, last = self.sink_size_start, x.keys.shape[2] - self.sink_size_end
        inner = {name: tap[:, :, first:last] for name, tap in tensors_of(x.taps).items() if name in ALONG_TOKENS}
        part = x.replace(inner)
        blending = self.blending if self.blending is not None else x.scalar("ratio")
        leverage = Leverage(self.sketch_dimension, self.seed).score(part)
        scores = blending * leverage + NonCausalAttention(self.chunk_size).score(part)
        return with_sinks(scores, first, self.sink_size_end)


def with_sinks(scores: Tensor, before: int, after: int) -> Tensor:
    """Add positions at both ends that have the greatest score of the row, no more."""
    from torch import cat

    top = scores.amax(dim=(1, 2), keepdim=True).expand(-1, scores.shape[1], -1)
    return cat([top.expand(-1, -1, before), scores, top.expand(-1, -1, after)], dim=-1)
