"""Keys that point another way than most are worth keeping. https://arxiv.org/abs/2504.15364"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from kvpass.press import ScorerPress
from kvpass.press_inputs import PressInputs
from kvpass.registry import register_press


@register_press("keydiff")
@dataclass(frozen=True)
class KeyDiff(ScorerPress):
    """Keeps keys that differ from the mean direction of all keys.

    The score is the negative cosine similarity of a key and the mean of all normalised keys. `block(keydiff)` is the
    iterative form of the paper.
    """

    def score(self, x: PressInputs) -> Tensor:
        anchor = F.normalize(x.keys, dim=-1).mean(dim=2, keepdim=True)
        return -F.cosine_similarity(x.keys, anchor, dim=-1)
