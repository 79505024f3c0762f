"""Close the gaps: what is kept stands side by side again. After StreamingLLM, https://arxiv.org/abs/2309.17453"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvpass.budget import Prompt
from kvpass.errors import NestingError
from kvpass.press import Compressed, Wrapper
from kvpass.press_inputs import PressInputs
from kvpass.presses.nesting import expect_press
from kvpass.registry import register_press
from kvpass.selection import gather


@register_press("key_rerotation")
@dataclass(frozen=True)
class KeyRerotation(Wrapper):
    """Keeps what the inner press keeps, its keys rotated to stand side by side and the text going on behind them.

    Keys before RoPE are rotated by the model's own frequencies at positions 0, 1, 2, ..., scaling included. Layers that
    keep fewer pairs than the longest one end at the same position; sliding-window layers are moved along.
    """

    changes = "drops pairs, re-rotates keys"

    def __post_init__(self) -> None:
        expect_press(self.name, self.press)
        if self.press.rerotates:
            raise NestingError(f"key_rerotation: {self.press.name} re-rotates keys itself")
        if not self.press.drops or self.press.changes_keys:
            raise NestingError(
                f"key_rerotation: {self.press.name} changes keys, which a rotation would mix; put it behind, as in "
                "composed([key_rerotation(snapkv), think])"
            )

    @property
    def rerotates(self) -> bool:
        return True

    def next_position(self, prompt: Prompt) -> int:
        layers = range(prompt.layers) if self.press.per_layer else (prompt.layer,)
        return max(self.press.sizes(replace(prompt, layer=layer))["budget"] for layer in layers)

    def sizes(self, prompt: Prompt) -> dict[str, int]:
        return {**self.press.sizes(prompt), "end": self.next_position(prompt)}

    def smallest(self) -> dict[str, int]:
        return self.press.smallest()

    def compress(self, x: PressInputs) -> Compressed:
        left = self.press.compress(x)
        assert left.kept is not None
        slots = left.kept.shape[2]
        count = slots if left.count is None else left.count[:, None]
        positions = torch.arange(slots, device=left.kept.device)[None] + (x.size("end") - count)
        return replace(left, keys=rerotated(x, gather(x.keys_pre_rope, left.kept), positions))

    def accompany(self, x: PressInputs) -> Compressed:
        tokens = x.keys.shape[2]
        positions = torch.arange(tokens, device=x.keys.device)[None] + (x.size("end") - tokens)
        return Compressed(rerotated(x, x.keys_pre_rope, positions), x.values)


def rerotated(x: PressInputs, keys: Tensor, positions: Tensor) -> Tensor:
    """Keys before RoPE [B, Hkv, N, D] at positions i64[B or 1, N]."""
    return x.key_rope.rotate(keys, x.key_rope.frequencies(positions)).to(x.keys.dtype)
