"""Drop what a head does not use of its keys: channels, not tokens. https://arxiv.org/abs/2407.21018"""

from dataclasses import dataclass

from torch import Tensor

from kvpass.budget import Prompt
from kvpass.errors import PressError
from kvpass.press import Compressed, Press
from kvpass.press_inputs import PressInputs
from kvpass.registry import register_press
from kvpass.selection import best


@register_press("think")
@dataclass(frozen=True)
class ThinK(Press):
    """Zeroes the key channels that the last queries of the prompt use least; all tokens stay.

    The importance of a channel is the mean square of the last `window_size` queries in it times the mean square of
    all keys; the fraction `key_channel_compression_ratio` of the channels of each KV head is set to zero. Keys that
    come later keep all channels. It takes no ratio and the cache keeps its size: the zeros are stored.
    """

    changes = "zeroes key channels"

    key_channel_compression_ratio: float = 0.5
    window_size: int = 32

    def __post_init__(self) -> None:
        if not 0 <= self.key_channel_compression_ratio < 1 or self.window_size < 1:
            raise PressError(
                f"think: key_channel_compression_ratio={self.key_channel_compression_ratio}, window_size="
                f"{self.window_size}; expected 0 <= ratio < 1 and a window of at least 1"
            )

    @property
    def min_tokens(self) -> int:
        return max(2, self.window_size)

    @property
    def needs_budget(self) -> bool:
        return False

    @property
    def drops(self) -> bool:
        return False

    @property
    def changes_keys(self) -> bool:
        return True

    def sizes(self, prompt: Prompt) -> dict[str, int]:
        return {}

    def compress(self, x: PressInputs) -> Compressed:
        removed = int(int(x.keys.shape[3]) * self.key_channel_compression_ratio)
        keys = x.keys if removed == 0 else x.keys.masked_fill(best(-self._importance(x), removed)[:, :, None], 0)
        return Compressed(keys, x.values)

    def _importance(self, x: PressInputs) -> Tensor:
        """[B, Hkv, D]"""
        asked = x.queries[:, :, -self.window_size :].pow(2).mean(dim=2)
        return x.per_kv_head(asked).mean(dim=2) * x.keys.pow(2).mean(dim=2)
