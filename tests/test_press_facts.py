"""The facts that the command line and the README show are those of the code."""

from dataclasses import dataclass

import pytest
from torch import Tensor

from kvpass import Press, PressInputs, ScorerPress, registered_presses
from kvpass.press_facts import docstring, facts_of, fields_of
from kvpass.presses import CriticalKV, KVzap, PerLayer, QFilter, SnapKV


@dataclass(frozen=True)
class Bare(ScorerPress):
    name = "bare"

    threshold: float

    def score(self, x: PressInputs) -> Tensor:
        return x.asset("thing") * x.values.norm(dim=-1)


@pytest.mark.parametrize("name", registered_presses())
def test_every_press_has_facts(name: str) -> None:
    facts = facts_of(registered_presses()[name])
    assert facts.name == name
    assert facts.sentence.endswith((".", "..."))
    assert facts.changes
    assert facts.needs is not None
    if not facts.of_inner:
        assert facts.needs[:2] == ("keys", "values")


def test_an_object_is_asked_itself() -> None:
    assert facts_of(SnapKV()).needs == ("keys", "values", "queries")
    wrapped = facts_of(CriticalKV(QFilter()))
    assert wrapped.needs_text == "keys, values, queries, output_weight, asset q_filters"
    assert facts_of(KVzap("linear")).needs_text.endswith("hidden_states, asset out_bias, asset out_weight")


def test_options_for_another_number_of_layers() -> None:
    """The stand-in has 4; the facts are those of the class."""
    assert facts_of(PerLayer(SnapKV(), (0.5,) * 30)).needs == ()


def test_a_press_from_elsewhere() -> None:
    """No docstring, no default, a learned tensor of unknown shape: said as far as it is known."""
    assert facts_of(Bare).needs_text == "depends on its options"
    assert docstring(Bare) == facts_of(Bare).sentence == ""
    assert facts_of(Bare).papers == ()
    assert facts_of(Bare(0.5)).needs_text == "asset thing"
    assert fields_of(Bare) == [("threshold", "float", "required")]
    assert fields_of(Bare(0.5)) == [("threshold", "float", "0.5")]


def test_papers_are_addresses() -> None:
    presses: dict[str, type[Press]] = dict(registered_presses())
    assert facts_of(presses["chunk"]).papers == ("https://doi.org/10.1162/tacl_a_00716",)
    assert facts_of(presses["snapkv"]).papers == ("https://arxiv.org/abs/2404.14469",)
    assert facts_of(presses["random"]).papers == ()
