"""Every attention gets its layer, or the error names layer and reason."""

import pytest
from models import captured_model
from modules import PlainLM
from torch import Tensor, nn

from kvpass.capture import capture
from kvpass.errors import UnsupportedModelError
from kvpass.ir.attention_site import attention_sites
from kvpass.ir.masks import Causal, Sliding
from kvpass.pass_manager import PassManager
from kvpass.pipeline import capture_passes


def test_sites_of_a_transformers_model() -> None:
    """Layer, module path, window and un-repeated heads of each site."""
    sites = attention_sites(captured_model("gemma3_text").graphs.located)
    assert [site.layer for site in sites] == [0, 1, 2, 3]
    assert [site.mask for site in sites] == [Sliding(16), Causal(), Sliding(16), Causal()]
    assert sites[2].path == "model.layers.2.self_attn"
    assert [site.keys.meta["val"].shape[1] for site in sites] == [2, 2, 2, 2]
    assert sites[0].scale == pytest.approx(0.25)


def test_a_layer_called_twice_has_two_caches() -> None:
    """The layer is the call, not the module."""

    class Twice(PlainLM):
        def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
            x = self.embed(input_ids)
            angles = position_ids[:, :, None].float().repeat(1, 1, 8)
            for _ in range(2):
                x = self.layers[0](x, angles.cos()[:, None], angles.sin()[:, None])
            return self.head(x)

    program = PassManager(capture_passes()).run(capture(Twice("causal")))
    assert [(site.layer, site.path) for site in attention_sites(program)] == [(0, "layers.0"), (1, "layers.0")]


def test_a_model_without_attention_is_refused() -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(64, 8), nn.Linear(8, 64)

        def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
            return self.head(self.embed(input_ids) + position_ids[..., None])

    with pytest.raises(UnsupportedModelError, match="no attention found"):
        PassManager(capture_passes()).run(capture(Bag()))
