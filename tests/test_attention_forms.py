"""Attention with soft-caps, sinks, ALiBi, or written out: one normal form, and the logits of the eager model."""

from functools import cache
from typing import Any

import pytest
import torch
from attention_forms import unusual_model
from graph_runs import GraphRun
from models import token_ids
from torch import Tensor
from torch.fx import Interpreter, Node

import kvpass
from kvpass.capture import capture
from kvpass.errors import PressError
from kvpass.ir.attention_op import ATTENTION, attend, distance_bias
from kvpass.ir.attention_site import SDPA, AttentionSite, attention_sites
from kvpass.ir.form import Phase
from kvpass.ir.program import KVProgram
from kvpass.pass_manager import PassManager
from kvpass.pipeline import capture_passes, phase_passes
from kvpass.presses import KeyRerotation, StreamingLLM

EAGER = {"attn_implementation": "eager"}
FORMS: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "soft-cap": ("gemma2", {}, {"softcap"}),
    "sinks": ("gpt_oss", {}, {"sinks"}),
    "written out": ("gptj", {}, set()),
    "written out, one KV head": ("falcon", EAGER, set()),
    "ALiBi by bmm": ("bloom", {}, {"slopes"}),
    "ALiBi by matmul": ("mpt", {}, {"slopes"}),
    "ALiBi in a float mask": ("falcon_alibi", {}, {"slopes"}),
    "ALiBi, scaled": ("falcon_alibi", EAGER, {"slopes"}),
    "two values": ("diffllama", {}, set()),
}
PROMPT, KEPT = 30, 12


@cache
def expected(form: str) -> tuple[Tensor, Tensor]:
    """Tokens, and what the eager model says of them; taken before anything is captured."""
    name, options, _ = FORMS[form]
    model = unusual_model(name, **options)
    if name in ("gemma2", "gpt_oss"):
        model.set_attn_implementation("eager")  # sdpa has neither soft-cap nor sinks
    ids = token_ids(2, 42) % 120
    with torch.no_grad():
        logits: Tensor = model(ids, use_cache=False).logits
    return ids, logits


@cache
def captured(form: str) -> kvpass.CapturedModel:
    name, options, _ = FORMS[form]
    return kvpass.capture_model(unusual_model(name, **options))


def located(form: str) -> KVProgram:
    return captured(form).graphs.located


def read_all(form: str, press: kvpass.Press | None, ids: Tensor) -> Tensor:
    """Prefill, several tokens, single tokens: the logits from the last token of the prompt on."""
    pieces = [ids[:, :PROMPT], ids[:, PROMPT : PROMPT + 8], *ids[:, PROMPT + 8 :].split(1, dim=1)]
    if "slopes" in FORMS[form][2]:
        run = GraphRun(located(form), 2, 64, press, KEPT)
        logits = [run.read(piece) for piece in pieces]
    else:
        model = kvpass.compile(captured(form), press, target_size=KEPT if press else None, backend="eager")
        cache = model.new_cache()
        logits = [model(input_ids=piece, past_key_values=cache).logits for piece in pieces]
    return torch.cat([logits[0][:, -1:], *logits[1:]], dim=1)


@pytest.mark.parametrize("form", FORMS)
def test_normal_form(form: str) -> None:
    """One node a layer: SDPA where that can say it, else `kvpass::attention` with what it needs."""
    extras = FORMS[form][2]
    sites = attention_sites(located(form))
    assert [site.node.target for site in sites] == [ATTENTION if extras else SDPA] * 2
    for site in sites:
        assert {name for name in ("softcap", "sinks", "slopes") if getattr(site, name) is not None} == extras


@pytest.mark.parametrize("form", FORMS)
def test_token_by_token_is_the_eager_model(form: str) -> None:
    ids, logits = expected(form)
    found = read_all(form, None, ids)
    torch.testing.assert_close(found, logits[:, PROMPT - 1 :], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_behind_a_press_the_dropped_pairs_are_missing_and_nothing_else(form: str) -> None:
    """As the model itself, its later tokens kept from looking at what was dropped."""
    ids, logits = expected(form)
    found = read_all(form, StreamingLLM(n_sink=3), ids)
    torch.testing.assert_close(found[:, 0], logits[:, PROMPT - 1], atol=1e-4, rtol=1e-4)
    without = _Blinded(located(form)).logits(ids)
    torch.testing.assert_close(found[:, 1:], without[:, PROMPT:], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(without[:, PROMPT:], logits[:, PROMPT:], atol=1e-2)


class _Blinded(Interpreter):
    """The located graph on a whole text, pressed pairs of the prompt hidden from what follows it."""

    def __init__(self, program: KVProgram) -> None:
        super().__init__(program.graph_module)
        self.sites = {site.node: site for site in attention_sites(program)}

    def logits(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            return self.run(ids, torch.arange(ids.shape[1]).repeat(ids.shape[0], 1))[0]

    def run_node(self, n: Node) -> Any:
        if n not in self.sites:
            return super().run_node(n)
        site: AttentionSite = self.sites[n]
        taps = (site.queries, site.keys, site.values, site.sinks, site.slopes)
        q, k, v, sinks, slopes = (None if tap is None else self.env[tap] for tap in taps)
        position = torch.arange(q.shape[2])
        seen = site.mask.allowed(position[:, None], position)
        if not site.bounded:
            dropped = (position >= 3) & (position < PROMPT - KEPT + 3)
            seen &= ~dropped | (position[:, None] < PROMPT)
        bias = None if slopes is None else distance_bias(slopes, position, position)
        columns = None if sinks is None else sinks[:, None, None]
        return attend(q, k, v, seen, scale=site.scale, softcap=site.softcap, sinks=columns, bias=bias)


@pytest.mark.parametrize("form", ["soft-cap", "sinks", "ALiBi by bmm"])
def test_no_backend_meets_our_operator(form: str) -> None:
    for phase in Phase:
        program = PassManager(phase_passes(phase, None)).run(located(form))
        assert not [node for node in program.graph.nodes if "kvpass" in str(node.target)]


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "gpt2", "diffllama"])
def test_written_out_or_through_the_registry_it_is_one_attention(name: str) -> None:
    """The eager code of the same model, matched, gives the same layers with the same numbers."""
    found = []
    for registry in (True, False):
        model = unusual_model(name)
        model.set_attn_implementation("eager")
        program = PassManager(capture_passes()).run(capture(model, registry=registry))
        found.append(
            [
                (site.softcap, site.sinks and site.sinks.target, str(site.mask), str(site.shape(site.values)[1:]))
                for site in attention_sites(program)
            ]
        )
    assert found[0] == found[1]


def test_keys_that_move_have_no_distance() -> None:
    program = located("ALiBi by bmm")
    press = KeyRerotation(StreamingLLM())
    with pytest.raises(PressError, match=r"key_rerotation moves keys, which this model weighs by distance"):
        PassManager(phase_passes(Phase.PREFILL, press)).run(program)


def test_compiled_models_generate() -> None:
    """Through the public interface, own attention code and all."""
    for name in ("gemma2", "gptj"):
        model = kvpass.compile(unusual_model(name), "snapkv(window_size=8)", 0.5, backend="eager")
        out = model.generate(token_ids(1, 40) % 120, max_new_tokens=4, do_sample=False)
        assert out.shape == (1, 44)
