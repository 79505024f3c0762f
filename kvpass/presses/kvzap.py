"""A small network foretells which pairs a second reading would need. https://arxiv.org/abs/2601.07891"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kvpass.assets import expect_shape, load_tensors, short_name
from kvpass.errors import PressError
from kvpass.press import ModelFacts, ScorerPress
from kvpass.press_inputs import PressInputs
from kvpass.registry import register_press


@register_press("kvzap")
@dataclass(frozen=True)
class KVzap(ScorerPress):
    """Keeps what a small network, trained on the scores of KVzip+, finds in the hidden state of each token.

    One linear layer ("linear") or two with a GELU between them ("mlp") per decoder layer. `surrogate` is a local file
    or folder or a hub id, by default the one that the paper's authors published for the model.
    """

    model_type: Literal["linear", "mlp"] = "mlp"
    surrogate: str | None = None

    def __post_init__(self) -> None:
        if self.model_type not in ("linear", "mlp"):
            raise PressError(f"kvzap: model_type={self.model_type!r}, expected 'linear' or 'mlp'")

    @property
    def local(self) -> bool:
        return True

    def assets(self, facts: ModelFacts) -> Mapping[str, Tensor]:
        source = self.surrogate or f"nvidia/KVzap-{self.model_type}-{short_name(facts.name)}"
        stored = load_tensors(source, self.name, "surrogate", facts)
        parts = {"0": "in", "2": "out"} if self.model_type == "mlp" else {"": "out"}
        found: dict[str, Tensor] = {}
        for part, ours in parts.items():
            for kind in ("weight", "bias"):
                names = [".".join(filter(None, ["layers", str(i), part, kind])) for i in range(facts.layers)]
                missing = [name for name in names if name not in stored]
                if missing:
                    raise PressError(
                        f"kvzap: {source} has no tensor {missing[0]!r}; it holds {len(stored)} tensors such as "
                        f"{next(iter(stored))!r}. Is model_type={self.model_type!r} right, and the model this one?"
                    )
                found[f"{ours}_{kind}"] = torch.stack([stored[name] for name in names])
        hidden = found["in_weight"].shape[1] if "in_weight" in found else facts.hidden_size
        expect_shape(self.name, source, "output weight", found["out_weight"], (facts.layers, facts.kv_heads, hidden))
        if "in_weight" in found:
            wanted = (facts.layers, hidden, facts.hidden_size)
            expect_shape(self.name, source, "input weight", found["in_weight"], wanted)
        return found

    def score(self, x: PressInputs) -> Tensor:
        states = x.hidden_states
        if self.model_type == "mlp":
            states = F.gelu(F.linear(states, x.asset("in_weight"), x.asset("in_bias")))
        return F.linear(states, x.asset("out_weight"), x.asset("out_bias")).transpose(1, 2)
