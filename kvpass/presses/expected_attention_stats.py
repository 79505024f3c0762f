"""Expected attention with statistics of the queries that were learned beforehand. https://arxiv.org/abs/2510.00636"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from kvpass.assets import expect_shape, load_tensors, tensor_of
from kvpass.press import ModelFacts
from kvpass.press_inputs import PressInputs
from kvpass.presses.expected_attention import ExpectedAttention
from kvpass.registry import register_press


@register_press("expected_attention_stats")
@dataclass(frozen=True)
class ExpectedAttentionStats(ExpectedAttention):
    """Keeps what future queries are expected to attend to, by statistics of the model instead of the prompt.

    `stats_folder` is a local file or folder, or a hub id; by default the one that the paper's authors published for
    the model and `dataset_name`, `num_samples`, `sample_seq_len`. `kvpass calibrate --method expected_attention_stats`
    makes them for your model.
    """

    sample_seq_len: int = 1000
    num_samples: int = 100
    dataset_name: str = "kmfoda/booksum"
    stats_folder: str | None = None

    def assets(self, facts: ModelFacts) -> Mapping[str, Tensor]:
        source = self.stats_folder or "alessiodevoto/exp_att_stats_" + "_".join(
            [
                facts.name.replace("/", "_") or "unknown",
                self.dataset_name.replace("/", "_"),
                *map(str, (self.num_samples, self.sample_seq_len, self.n_sink)),
            ]
        )
        stored = load_tensors(source, self.name, "stats_folder", facts)
        shape = (facts.layers, facts.heads, facts.key_size)
        shapes: dict[str, tuple[int, ...]] = {"query_mean": shape, "query_cov": (*shape, facts.key_size)}
        found = {name: tensor_of(self.name, source, stored, name) for name in shapes}
        for name, tensor in found.items():
            expect_shape(self.name, source, name, tensor, shapes[name])
        return found

    def statistics(self, x: PressInputs) -> tuple[Tensor, Tensor | None]:
        batch = x.keys.shape[0]
        mean = x.asset("query_mean")[None, :, None].expand(batch, -1, -1, -1)
        if not self.use_covariance:
            return mean, None
        return mean, x.asset("query_cov")[None].expand(batch, -1, -1, -1)
