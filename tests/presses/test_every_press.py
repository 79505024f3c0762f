"""What holds for every registered press, whatever its method."""

import contextlib
import dataclasses
import re

import pytest
import torch
from catalogue import press_by_name
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from models import captured_model, token_ids

import kvpass
from kvpass.budget import Budget, Prompt
from kvpass.errors import PressError
from kvpass.ir.form import Phase
from kvpass.pass_manager import PassManager
from kvpass.pipeline import phase_passes
from kvpass.press import Compressed, Press
from kvpass.registry import parse_press
from kvpass.testing import check_press, random_inputs

OURS = sorted(name for name, cls in kvpass.registered_presses().items() if cls.__module__.startswith("kvpass."))
SLACK = {"chunkkv"}  # counts chunks, not tokens
each_press = pytest.mark.parametrize("name", OURS)


@each_press
@pytest.mark.parametrize("arch", [pytest.param("llama", marks=pytest.mark.exhaustive), "gemma3_text"])
def test_the_graph_keeps_what_the_eager_code_keeps(name: str, arch: str) -> None:
    """At two lengths that were never the example's."""
    captured = captured_model(arch)
    for left in check_press(press_by_name(name, captured.graphs.located.layer_count), captured, lengths=(71, 122)):
        assert left


@pytest.mark.parametrize("name", ["block", "chunk", "chunkkv", "entropy_gated_chunkkv", "lagkv", "observed_attention"])
def test_every_rest_of_a_division_is_served(name: str) -> None:
    """No rest, a rest of one token, a full one: wherever a text is cut into pieces of 7, 8, 10, 16 or 24."""
    captured = captured_model("llama")
    check_press(press_by_name(name, 2), captured, lengths=(64, 65, 70, 72, 73, 80, 81, 84, 85, 95, 96, 97, 98))


@each_press
def test_the_length_stays_symbolic(name: str) -> None:
    """No size is assumed to be another one, but that strides are those of a tensor with something in it.

    With the options that users have, where there are such: small ones may hide what long prompts need.
    """
    captured = captured_model("llama")
    press = press_by_name(name, captured.graphs.located.layer_count)
    if type(press).assets is Press.assets:
        with contextlib.suppress(PressError):  # it must be told something
            press = parse_press(name)
    press = press.for_prompt(Prompt(4096, Budget(0.5), 0, captured.graphs.located.layer_count))
    # By hand, since presses that are compiled from one capture share the sizes, and those of stored graphs say nothing.
    shapes = PassManager(phase_passes(Phase.PREFILL, press)).run(captured.graphs.located).shapes
    assert not shapes.specialized()
    for guard in shapes.shape_env.guards:
        assumed = str(guard.expr)
        assert not re.match(r"Eq\((?!.*Max\(1, )", assumed), f"{name} assumes {assumed}"


def compressed(press: Press, tokens: int, budget: Budget, **options: object) -> tuple[Compressed, Press, Prompt]:
    """What the press leaves of random tensors, layer 0 of 4."""
    prompt = Prompt(tokens, budget, 0, 4, question=min(8, tokens - 1))
    chosen = press.for_prompt(prompt)
    return chosen.compress(random_inputs(tokens, budget, press=chosen, **options)), chosen, prompt  # type: ignore[arg-type]


@each_press
@settings(deadline=None, max_examples=12)
@given(data=st.data())
def test_counts_order_and_finiteness(name: str, data: st.DataObject) -> None:
    """As many pairs as counted, ascending, no pair twice, and finite numbers in float32 and bfloat16."""
    press = press_by_name(name, 4)
    tokens = data.draw(st.integers(max(30, press.min_tokens), 150), "tokens")
    budget = Budget(ratio=data.draw(st.sampled_from([0.1, 0.25, 0.5, 0.75, 0.9]), "ratio"))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]), "dtype")
    prompt = Prompt(tokens, budget, 0, 4, question=8)
    if not press.fits(prompt):
        return
    left, chosen, prompt = compressed(press, tokens, budget, dtype=dtype, seed=data.draw(st.integers(0, 99), "seed"))
    assert left.keys.dtype == left.values.dtype == dtype
    assert bool(left.keys.isfinite().all()) and bool(left.values.isfinite().all())
    if left.scores is not None:
        assert bool(left.scores.isfinite().all())
    if left.kept is None:
        assert left.keys.shape[2] == tokens
        return
    slots = chosen.sizes(prompt)["budget"]
    assert left.kept.shape == (2, 2, slots)
    counts = [slots, slots] if left.count is None else left.count.tolist()
    for row, count in enumerate(counts):
        kept = left.kept[row, :, :count]
        assert bool((kept.diff(dim=-1) > 0).all())
        assert count > 0 and int(kept.max()) < tokens and int(kept.min()) >= 0
        if press.needs_budget and name not in SLACK and name not in ("chunk", "finch", "pyramidkv"):
            assert count == prompt.kept


@each_press
def test_a_row_does_not_depend_on_its_neighbours(name: str) -> None:
    press = press_by_name(name, 4)
    budget = Budget(ratio=0.5)
    together, chosen, _ = compressed(press, 83, budget, batch=3)
    x = random_inputs(83, budget, press=chosen, batch=3)
    for row in range(3):
        taps = {n: t[row : row + 1] for n, t in x.taps.items() if not n.startswith("asset.") and n != "output_weight"}
        alone = chosen.compress(x.replace(taps))
        for field in dataclasses.fields(alone):
            one, all_rows = getattr(alone, field.name), getattr(together, field.name)
            if one is not None:
                torch.testing.assert_close(one, all_rows[row : row + 1], msg=f"{name}: {field.name} of row {row}")


@each_press
def test_the_compiled_model_goes_on_behind_the_compressed_prompt(name: str) -> None:
    """Prefill, a question, single tokens, rewind, save and load: nothing depends on how the cache came about."""
    captured = captured_model("gemma3_text")
    press = press_by_name(name, captured.graphs.located.layer_count)
    model = kvpass.compile(captured, press, 0.5 if press.needs_budget else None, backend="eager")
    ids, question = token_ids(2, 90), token_ids(2, 5, seed=1)
    out = model.prefill(ids, question_tokens=8 if press.needs_question else None)
    cache = out.past_key_values
    expected = model(input_ids=question, past_key_values=cache).logits
    assert bool(expected.isfinite().all())
    singles = [model(input_ids=question[:, i : i + 1], past_key_values=cache.rewind()) for i in range(1)]
    singles += [model(input_ids=question[:, i : i + 1], past_key_values=cache) for i in range(1, 5)]
    torch.testing.assert_close(torch.cat([step.logits for step in singles], dim=1), expected, atol=1e-5, rtol=1e-5)
    for layer in range(len(cache)):
        lengths, positions = cache.lengths[layer], cache.positions(layer)
        if (ring := cache.layout.layers[layer].ring) is not None:  # its length is what it has seen
            assert lengths.tolist() == [95, 95]
            lengths = lengths.clamp(max=ring)
        assert positions.shape[2] == cache.kept(layer) == int(lengths.max())
        for row in range(2):
            here = positions[row, :, : int(lengths[row])]
            assert bool((here.diff(dim=-1) > 0).all())
            assert here[..., -5:].tolist() == [list(range(90, 95))] * here.shape[0]


@pytest.mark.parametrize("name", ["simlayerkv", "chunkkv", "key_rerotation", "finch", "per_layer"])
def test_saved_and_copied_caches_go_on_alike(name: str, tmp_path: object) -> None:
    """Rows of different length, other positions, layers of different length."""
    captured = captured_model("llama")
    press = press_by_name(name, captured.graphs.located.layer_count)
    model = kvpass.compile(captured, press, 0.5 if press.needs_budget else None, backend="eager")
    ids, question = token_ids(3, 90), token_ids(3, 5, seed=1)
    cache = model.prefill(ids, question_tokens=8 if press.needs_question else None).past_key_values
    cache.save(f"{tmp_path}/cache.safetensors")
    others = [cache.copy(), kvpass.CompressedCache.load(f"{tmp_path}/cache.safetensors")]
    expected = model(input_ids=question, past_key_values=cache).logits
    for other in others:
        torch.testing.assert_close(model(input_ids=question, past_key_values=other).logits, expected)
        assert torch.equal(other.positions(1), cache.positions(1))
    other = others[0].rewind()
    other.batch_select_indices(torch.tensor([2, 0]))
    found = model(input_ids=question[[2, 0]], past_key_values=other).logits
    torch.testing.assert_close(found, expected[[2, 0]], atol=1e-5, rtol=1e-5)


PROTECTED = {  # tokens at the start and at the end that are kept before all others, with the catalogue's options
    "cap": (4, 0),
    "chunk": (0, 4),
    "composed": (0, 4),
    "compactor": (8, 4),
    "cur": (4, 0),
    "expected_attention": (4, 0),
    "expected_attention_stats": (4, 0),
    "finch": (0, 8),
    "key_rerotation": (4, 1),
    "lagkv": (4, 8),
    "pyramidkv": (0, 4),
    "simlayerkv": (4, 11),
    "snapkv": (0, 4),
    "streaming_llm": (4, 1),
    "tova": (0, 1),
}


@pytest.mark.parametrize("name", PROTECTED)
@settings(deadline=None, max_examples=8)
@given(tokens=st.integers(60, 140), ratio=st.sampled_from([0.1, 0.5, 0.7]), seed=st.integers(0, 99))
def test_sinks_and_windows_are_kept(name: str, tokens: int, ratio: float, seed: int) -> None:
    left, chosen, prompt = compressed(press_by_name(name, 4), tokens, Budget(ratio=ratio), seed=seed)
    first, last = PROTECTED[name]
    assume(chosen.sizes(prompt).get("rest_budget", last) >= last)  # of a last chunk that is short
    assert left.kept is not None
    wanted = [*range(first), *range(tokens - last, tokens)]
    for row in range(2):
        count = left.kept.shape[2] if left.count is None else int(left.count[row])
        for head in left.kept[row, :, :count].tolist():
            assert set(wanted) <= set(head)


@pytest.mark.parametrize(("name", "allowed"), [("simlayerkv", 1), ("chunkkv", 1), ("snapkv", 0), ("pyramidkv", 0)])
def test_a_prefill_asks_the_device_once_at_most(name: str, allowed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the text decides how much is kept, one question for all layers together; otherwise none."""
    captured = captured_model("gemma3_text")
    press = press_by_name(name, captured.graphs.located.layer_count)
    model = kvpass.compile(captured, press, 0.5 if press.needs_budget else None, backend="eager")
    model.prefill(token_ids(2, 90))
    asked = []
    for method in ("tolist", "item", "__bool__", "__int__", "__float__", "nonzero"):
        plain = getattr(torch.Tensor, method)
        monkeypatch.setattr(torch.Tensor, method, lambda self, plain=plain, m=method: (asked.append(m), plain(self))[1])
    model.prefill(token_ids(2, 83))
    assert len(asked) == allowed, asked


def test_presses_that_need_long_prompts_fit_into_the_cache() -> None:
    """The example length of a graph follows the press; the example capacity must stay above it."""
    model = kvpass.compile(captured_model("llama"), "chunk(snapkv, chunk_length=700)", ratio=0.1, backend="eager")
    cache = model.prefill(token_ids(1, 1600)).past_key_values
    assert cache.kept(0) == 630 + 630 + 180
