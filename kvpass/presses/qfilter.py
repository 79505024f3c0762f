"""One direction per head tells which keys queries look for. https://arxiv.org/abs/2503.02812"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from kvpass.assets import expect_shape, load_tensors, short_name, tensor_of
from kvpass.press import ModelFacts, ScorerPress
from kvpass.press_inputs import PressInputs
from kvpass.registry import register_press


@register_press("qfilter")
@dataclass(frozen=True)
class QFilter(ScorerPress):
    """Keeps keys that lie against the direction in which the queries of their head spread.

    The directions are learned once for a model: `filters` is a local file or folder, or a hub id (by default the one
    that the paper's authors published for the model). `kvpass calibrate --method qfilter` makes them for your model.
    """

    filters: str | None = None

    def assets(self, facts: ModelFacts) -> Mapping[str, Tensor]:
        source = self.filters or f"nthngdy/{short_name(facts.name, meta_llama=True)}_qfilt"
        found = tensor_of(self.name, source, load_tensors(source, self.name, "filters", facts), "q_filters")
        expect_shape(self.name, source, "q_filters", found, (facts.layers, facts.kv_heads, facts.key_size))
        return {"q_filters": found}

    def score(self, x: PressInputs) -> Tensor:
        return -(x.asset("q_filters")[:, None] * x.keys).sum(dim=-1)
