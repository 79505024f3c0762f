"""Both branches of the guard in one program, for runtimes with a single entry point."""

import torch
from torch import Tensor, nn

from kvpass.deployment.modules import Named, Prefill, Step

STATE = ("logits", "lengths", "next_position")


class Guarded(nn.Module):
    """One program that compresses a prompt over an empty cache and appends to any other, as `torch.cond` decides.

    forward(input_ids i64[B, S], new_tokens i64[B], lengths, next_position, caches...) -> logits [B, 1, V] of the last
    token that is meant, and the state. Caches have a fixed number of slots, so a prompt's kept pairs lie in front of
    free ones. Of the ids the first `new_tokens` are meant; the rest is padding, since one program cannot also be one
    of a single token: it takes no fewer ids than the press needs. A prompt that is padded is kept whole.
    """

    def __init__(self, prefill: Prefill, step: Step) -> None:
        super().__init__()
        self.prefill, self.step = prefill, step
        self.names = [f"{port.role.value}_{port.layer}" for port in step.stored]

    def forward(
        self, input_ids: Tensor, new_tokens: Tensor, lengths: Tensor, next_position: Tensor, *caches: Tensor
    ) -> Named:
        """See the class."""
        first = (lengths.sum() == 0) & (new_tokens == input_ids.shape[1]).all()
        outputs = torch.cond(
            first, self._compress, self._append, (input_ids, new_tokens, lengths, next_position, *caches)
        )
        return dict(zip((*STATE, *self.names), outputs, strict=True))

    def _compress(
        self, input_ids: Tensor, new_tokens: Tensor, lengths: Tensor, next_position: Tensor, *caches: Tensor
    ) -> tuple[Tensor, ...]:
        found = self.prefill(input_ids)
        stored = [
            torch.slice_scatter(cache, found[name], 2, 0, found[name].shape[2])
            for name, cache in zip(self.names, caches, strict=True)
        ]
        return (*[found[name] for name in STATE], *stored)

    def _append(
        self, input_ids: Tensor, new_tokens: Tensor, lengths: Tensor, next_position: Tensor, *caches: Tensor
    ) -> tuple[Tensor, ...]:
        found = self.step.append(input_ids, new_tokens, lengths, next_position, *caches)
        last = (new_tokens - 1)[:, None, None].expand(-1, 1, found["logits"].shape[2])
        return (found["logits"].gather(1, last), *[found[name] for name in (*STATE[1:], *self.names)])
