"""How presses are named, nested, and taken over from kvpress."""

import pytest
import torch
from models import compiled_model, token_ids

import kvpass
from kvpass import presses
from kvpass.errors import InputError, NestingError, PressError
from kvpass.kvpress_names import NAMES, from_kvpress
from kvpass.press import Press
from kvpass.registry import parse_press, press_class, resolve_press


@pytest.mark.parametrize(
    ("text", "press"),
    [
        ("snapkv", presses.SnapKV()),
        ("snapkv(window_size=32)", presses.SnapKV(window_size=32)),
        ("snapkv(16, kernel_size=3)", presses.SnapKV(16, 3)),
        ("chunkkv(snapkv, chunk_length=16)", presses.ChunkKV(presses.SnapKV(), chunk_length=16)),
        (
            " key_rerotation( chunkkv(snapkv(window_size=8)) ) ",
            presses.KeyRerotation(presses.ChunkKV(presses.SnapKV(8))),
        ),
        ("composed([snapkv, think(0.25)])", presses.Composed((presses.SnapKV(), presses.ThinK(0.25)))),
        (
            "composed((knorm, keydiff), ratios=[0.5, 0.25])",
            presses.Composed((presses.Knorm(), presses.KeyDiff()), (0.5, 0.25)),
        ),
        ("per_layer(knorm, [0.1, 0.5])", presses.PerLayer(presses.Knorm(), (0.1, 0.5))),
        ("cur(leverage_type='key')", presses.CUR(leverage_type="key")),
    ],
)
def test_text_means_an_object(text: str, press: Press) -> None:
    assert parse_press(text) == press
    assert resolve_press(text) == (press, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("snpkv", "there is no press 'snpkv'; did you mean 'snapkv'"),
        ("chunkkv(snpkv)", "there is no press 'snpkv'"),
        ("chunkkv", r"chunkkv needs press, e.g. chunkkv\(snapkv\)"),
        ("snapkv(window=3)", "snapkv has no option 'window'; its options are window_size, kernel_size"),
        ("knorm(1)", "knorm has no option number 1; its options are none"),
        ("snapkv(", r"neither a name nor of the form name\(press, option=value\)"),
        ("snapkv(window_size=1 + 1j)", "."),
        ("__import__('os')", "there is no press '__import__'"),
        ("[snapkv]", "neither a name"),
        ("snapkv(window_size=open)", "there is no press 'open'"),
    ],
)
def test_what_is_wrong_in_a_text_is_said(text: str, message: str) -> None:
    with pytest.raises((PressError, TypeError), match=message):
        parse_press(text)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: presses.ChunkKV(presses.ThinK()), "chunkkv takes a press that scores pairs, think does not"),
        (lambda: presses.CriticalKV(presses.ChunkKV(presses.Knorm())), "criticalkv takes a press that scores pairs"),
        (lambda: presses.Chunk(presses.SnapKV), r"SnapKV is a class; give an object: SnapKV\(\)"),
        (lambda: presses.Block("knorm"), r'expected a press object; in text form write "block\(snapkv\)"'),
        (lambda: presses.KeyRerotation(presses.KeyRerotation(presses.Knorm())), "re-rotates keys itself"),
        (lambda: presses.KeyRerotation(presses.Finch()), "re-rotates keys itself"),
        (lambda: presses.KeyRerotation(presses.ThinK()), "changes keys, which a rotation would mix"),
        (lambda: presses.Merging(presses.ChunkKV(presses.Knorm())), "merging takes a press that scores pairs"),
        (lambda: presses.PerLayer(presses.SimLayerKV(), (0.5,)), "says itself what each layer keeps"),
        (lambda: presses.PerLayer(presses.PyramidKV(), (0.5,)), "says itself what each layer keeps"),
        (
            lambda: presses.Composed((presses.Knorm(), presses.ObservedAttention())),
            "pairs every key with its own query",
        ),
        (lambda: presses.Composed((presses.Knorm(), presses.Compactor())), "pairs every key with its own query"),
        (lambda: presses.Composed((presses.ChunkKV(presses.Knorm()), presses.Knorm())), "put it last"),
        (lambda: presses.Composed((presses.Knorm(), presses.KeyRerotation(presses.Knorm()))), "can only stand first"),
        (lambda: presses.Composed((presses.Finch(),)), "can only stand alone"),
    ],
)
def test_forbidden_nestings_are_type_errors_that_say_why(make: object, message: str) -> None:
    with pytest.raises(TypeError, match=message) as caught:
        make()  # type: ignore[operator]
    assert isinstance(caught.value, NestingError)


class RandomPress:
    """What kvpress calls its presses is all that is looked at."""

    compression_ratio, seed = 0.3, None


class SnapKVPress:
    compression_ratio, window_size, kernel_size = 0.25, 16, 3


class ChunkKVPress:
    compression_ratio, chunk_length = 0.25, 12
    press = SnapKVPress()


class ThinKPress:
    compression_ratio, key_channel_compression_ratio, window_size = 0.2, 0.4, 16


class ComposedPress:
    compression_ratio = None
    presses = (SnapKVPress(), ThinKPress())


class FinchPress:
    compression_ratio, delimiter_token, delimiter_token_id, rerotate_keys = 0.5, "<|q|>", 77, False


class OwnPress:
    compression_ratio = 0.5


for _fake in (RandomPress, SnapKVPress, ChunkKVPress, ThinKPress, ComposedPress, FinchPress, OwnPress):
    _fake.__module__ = "kvpress.presses.fake"


def test_presses_of_kvpress_are_taken_over() -> None:
    """Same fields, same ratio, also inside wrappers; kvpress is not imported."""
    inner = presses.SnapKV(16, 3)
    assert resolve_press(RandomPress()) == (presses.Random(), 0.3)
    assert resolve_press(ChunkKVPress()) == (presses.ChunkKV(inner, 12), 0.25)
    assert resolve_press(FinchPress()) == (presses.Finch(rerotate_keys=False, delimiter=77), 0.5)
    assert resolve_press(ThinKPress()) == (presses.ThinK(0.4, 16), None)
    assert resolve_press(ComposedPress()) == (presses.Composed((inner, presses.ThinK(0.4, 16)), (0.25, None)), None)
    model = compiled_model("llama", SnapKVPress())  # type: ignore[arg-type]
    assert model.prefill(token_ids(1, 80)).past_key_values.kept(0) == 60
    with pytest.raises(PressError, match="OwnPress of kvpress has no counterpart"):
        from_kvpress(OwnPress(), press_class)


def test_every_name_of_kvpress_is_one_of_ours() -> None:
    ours = {name for name, cls in kvpass.registered_presses().items() if cls.__module__.startswith("kvpass.")}
    assert set(NAMES.values()) == ours


def test_ratios_that_a_press_does_not_take_are_refused() -> None:
    with pytest.raises(PressError, match="'think' says itself what it keeps; leave out ratio"):
        compiled_model("llama", "think", ratio=0.5)
    with pytest.raises(PressError, match="think says itself"):
        compiled_model("llama", "think").set_budget(ratio=0.5)
    with pytest.raises(PressError, match="3 compression_ratios, the model has 2 layers"):
        compiled_model("llama", presses.PerLayer(presses.Knorm(), (0.1, 0.2, 0.3))).prefill(token_ids(1, 40))


def test_the_question_of_finch() -> None:
    """By a delimiter, which the model never sees, or by a count; the same cache, and positions behind what is kept."""
    ids, question = token_ids(2, 60), token_ids(2, 7, seed=3)
    by_id = compiled_model("llama", "finch", ratio=0.5, delimiter=-7)
    delimiter = ids.new_full((2, 1), -7)
    prompt = torch.cat([ids, delimiter, question], dim=1)
    first = by_id.prefill(prompt).past_key_values
    second = by_id.prefill(torch.cat([ids, question], dim=1), question_tokens=7).past_key_values
    assert torch.equal(first.keys(1), second.keys(1)) and torch.equal(first.positions(1), second.positions(1))
    assert (first.seen_tokens, first.get_seq_length(), first.next_position) == (67, 68, 33)
    assert first.positions(0)[0, 0, -7:].tolist() == list(range(60, 67))
    out = by_id.generate(prompt, max_new_tokens=4, do_sample=False)
    assert out.shape == (2, 72)
    ragged = prompt.clone()  # in the second row the question is longer
    ragged[1, 58:61] = torch.tensor([-7, 5, 6])
    alone = [by_id.prefill(row[None]).past_key_values for row in ragged]
    both = by_id.prefill(ragged).past_key_values
    for row, cache in enumerate(alone):
        assert torch.equal(both.positions(1)[row, :, : cache.kept(1)], cache.positions(1)[0])
    with pytest.raises(InputError, match="must know where the question begins"):
        by_id.prefill(ids)
    with pytest.raises(InputError, match="expected once in each row"):
        by_id.prefill(torch.cat([delimiter, prompt], dim=1))
    with pytest.raises(InputError, match="asks for none"):
        compiled_model("llama", "knorm", ratio=0.5).prefill(ids, question_tokens=3)
    with pytest.raises(PressError, match="asks for none, finch does"):
        compiled_model("llama", "knorm", ratio=0.5, delimiter=3)
