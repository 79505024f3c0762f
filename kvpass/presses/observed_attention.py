"""Keep what the prompt itself attended to. After H2O, https://arxiv.org/abs/2306.14048"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvpass.errors import PressError
from kvpass.loops import unaliased, while_loop
from kvpass.press import ScorerPress
from kvpass.press_inputs import PressInputs
from kvpass.registry import register_press


@register_press("observed_attention")
@dataclass(frozen=True)
class ObservedAttention(ScorerPress):
    """Keeps what the tokens of the prompt attended to on average.

    The score is the attention that a key received, summed over the queries that can see it and divided by their
    number, in float32. The weights are computed again, `block` queries at a time, in a loop inside the graph; attention
    itself stays what it is. Extra memory: 4 * B * H * S * (2 * block + 1) bytes, never S * S.
    """

    needs_all_queries = True

    block: int = 64

    def __post_init__(self) -> None:
        if self.block < 1:
            raise PressError(f"observed_attention: block={self.block}, expected at least 1")

    def score(self, x: PressInputs) -> Tensor:
        queries, keys = unaliased(x.queries, x.keys)
        queries, keys, scale, block = x.per_kv_head(queries), keys[:, :, None], x.scale, self.block
        tokens = queries.shape[3]
        position = torch.arange(tokens, device=keys.device)

        def unfinished(start: Tensor, received: Tensor) -> Tensor:
            return start < tokens

        def add_block(start: Tensor, received: Tensor) -> tuple[Tensor, Tensor]:
            row = torch.arange(block, device=keys.device) + start
            rows = queries.index_select(3, row.clamp(max=tokens - 1))
            logits = (rows @ keys.transpose(-1, -2)).to(torch.float32) * scale
            weights = logits.masked_fill(position > row[:, None], float("-inf")).softmax(dim=-1)
            return start + block, received + (weights * (row < tokens)[:, None]).sum(dim=3)

        first = torch.zeros((), dtype=torch.int64, device=keys.device)
        received = torch.zeros(queries.shape[:4], dtype=torch.float32, device=keys.device)
        _, received = while_loop(unfinished, add_block, (first, received))
        mean: Tensor = (received / (tokens - position)).mean(dim=2)
        return mean
