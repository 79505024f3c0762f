"""Compress for a question: keep what it attends to. FINCH, https://doi.org/10.1162/tacl_a_00716"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvpass.budget import Prompt
from kvpass.errors import PressError
from kvpass.press import Compressed, Press, ScorerPress
from kvpass.press_inputs import PressInputs
from kvpass.presses.key_rerotation import rerotated
from kvpass.presses.window_attention import protect_window, window_attention
from kvpass.registry import register_press
from kvpass.selection import best, gather


@register_press("finch")
@dataclass(frozen=True)
class Finch(ScorerPress):
    """Keeps what the question at the end of the prompt attends to.

    The question begins behind the token id `delimiter`, which is taken out of the prompt, or is the last
    `question_tokens` given to the model. Its attention is multiplied by the number of tokens that each query can see
    (`normalize_scores`) and averaged. With `chunk_length` every chunk keeps its share. With `rerotate_keys` the kept
    keys move to positions 0, 1, 2, ... and the text goes on behind them.
    """

    changes = "drops pairs, re-rotates keys"

    chunk_length: int | None = None
    normalize_scores: bool = True
    rerotate_keys: bool = True
    delimiter: int | None = None

    def __post_init__(self) -> None:
        if self.chunk_length is not None and self.chunk_length < 1:
            raise PressError(f"finch: chunk_length={self.chunk_length}, expected at least 1, or None for no chunks")

    @property
    def min_tokens(self) -> int:
        return 2 if self.chunk_length is None else self.chunk_length + 1

    @property
    def example_tokens(self) -> int:
        return 2 * self.min_tokens + (61 if self.chunk_length is None else max(self.chunk_length // 2, 1))

    def fits(self, prompt: Prompt) -> bool:
        return prompt.tokens >= 2

    @property
    def needs_question(self) -> bool:
        return True

    @property
    def rerotates(self) -> bool:
        return self.rerotate_keys

    def next_position(self, prompt: Prompt) -> int:
        return self.sizes(prompt)["budget"] if self.rerotate_keys else prompt.tokens

    def for_prompt(self, prompt: Prompt) -> Press:
        return replace(self, chunk_length=None) if prompt.tokens <= (self.chunk_length or 0) else self

    def sizes(self, prompt: Prompt) -> dict[str, int]:
        window = prompt.question or 1
        if self.chunk_length is None or prompt.tokens <= self.chunk_length:
            return {"budget": prompt.kept, "window": window}
        if self.chunk_length <= window / (1 - prompt.ratio):
            raise PressError(
                f"finch: a question of {window} tokens at ratio {prompt.ratio} does not fit into what a chunk of "
                f"{self.chunk_length} keeps; give a chunk_length above {window / (1 - prompt.ratio):.0f}"
            )
        rest = (prompt.tokens - 1) % self.chunk_length + 1
        chunks = (prompt.tokens - rest) // self.chunk_length
        per_chunk, last = (max(1, int(n * (1 - prompt.ratio))) for n in (self.chunk_length, rest))
        return {"budget": chunks * per_chunk + last, "window": window, "chunk": per_chunk, "rest": last}

    def score(self, x: PressInputs) -> Tensor:
        tokens, window = x.keys.shape[2], x.size("window")
        attention = window_attention(x, window)  # [B, Hkv, G, window, S - window]
        if self.normalize_scores:
            seen = torch.arange(window, device=attention.device) + (tokens - window)
            attention = attention * seen[:, None].to(attention.dtype)
        return protect_window(x, attention.mean(dim=(2, 3)), window)

    def keep(self, x: PressInputs) -> Tensor:
        return self._best(x, self.score(x))

    def _best(self, x: PressInputs, scores: Tensor) -> Tensor:
        if self.chunk_length is None:
            return best(scores, x.budget)
        chunks = (scores.shape[2] - 1) // self.chunk_length
        whole = chunks * self.chunk_length
        parts = best(scores[:, :, :whole].unflatten(2, (chunks, self.chunk_length)), x.size("chunk"))
        return torch.cat([parts.flatten(2, 3), best(scores[:, :, whole:], x.size("rest"))], dim=2)

    def compress(self, x: PressInputs) -> Compressed:
        scores = self.score(x)
        left = self.compacted(x, self._best(x, scores), scores)
        if not self.rerotate_keys:
            return left
        assert left.kept is not None
        positions = torch.arange(x.budget, device=x.keys.device)[None]
        return replace(left, keys=rerotated(x, gather(x.keys_pre_rope, left.kept), positions))

    def accompany(self, x: PressInputs) -> Compressed | None:
        if not self.rerotate_keys:
            return None
        tokens = x.keys.shape[2]
        positions = torch.arange(tokens, device=x.keys.device)[None] + (x.budget - tokens)
        return Compressed(rerotated(x, x.keys_pre_rope, positions), x.values)
