"""Each stretch of the text is judged by the value range of the next one. https://arxiv.org/abs/2504.04704"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvpass.budget import Prompt
from kvpass.errors import PressError
from kvpass.press import Press, ScorerPress
from kvpass.press_inputs import PressInputs
from kvpass.presses.streaming_llm import StreamingLLM
from kvpass.registry import register_press


@register_press("lagkv")
@dataclass(frozen=True)
class LagKV(ScorerPress):
    """Keeps tokens that vary more than the next `lag_size` tokens would have them.

    Keys and values are scaled by the range, per channel, of the next partition; the score is their spread over the
    channels, ranked inside the partition unless `cross_scoring`. The first `n_sink` tokens and the last partition with
    its rest come first. Prompts shorter than n_sink + 2 * lag_size keep the sinks and the most recent tokens.
    """

    n_sink: int = 4
    lag_size: int = 128
    cross_scoring: bool = False

    def __post_init__(self) -> None:
        if self.n_sink < 0 or self.lag_size < 2:
            raise PressError(
                f"lagkv: n_sink={self.n_sink}, lag_size={self.lag_size}; expected at least 0 and at least 2"
            )

    @property
    def min_tokens(self) -> int:
        return self.n_sink + 2 * self.lag_size

    def fits(self, prompt: Prompt) -> bool:
        return prompt.tokens > max(1, self.n_sink)

    def for_prompt(self, prompt: Prompt) -> Press:
        return self if prompt.tokens >= self.min_tokens else StreamingLLM(self.n_sink)

    def score(self, x: PressInputs) -> Tensor:
        tokens = x.keys.shape[2]
        judged = (tokens - self.n_sink) // self.lag_size - 1  # partitions that have a next one
        spread = (self._spread(x.keys, judged) + self._spread(x.values, judged)) / 2
        if not self.cross_scoring:
            rank = spread.argsort(dim=-1, stable=True).argsort(dim=-1, stable=True)
            spread = (rank / self.lag_size).to(x.keys.dtype)
        ends = (self.n_sink, tokens - self.n_sink - judged * self.lag_size)
        first, last = (torch.ones_like(x.keys[:, :, :count, 0]) for count in ends)
        return torch.cat([first, spread.flatten(2, 3), last], dim=-1)

    def _spread(self, states: Tensor, judged: int) -> Tensor:
        """[B, Hkv, judged, lag_size]"""
        length = (judged + 1) * self.lag_size
        parts = states[:, :, self.n_sink : self.n_sink + length].unflatten(2, (judged + 1, self.lag_size))
        low, high = parts[:, :, 1:].amin(dim=3, keepdim=True), parts[:, :, 1:].amax(dim=3, keepdim=True)
        extent = high - low
        scaled = (parts[:, :, :-1] - low) / torch.where(extent == 0, 1, extent)  # a constant channel says nothing
        spread: Tensor = scaled.masked_fill(extent == 0, 0).std(dim=-1).softmax(dim=-1)
        return spread
