"""Plain modules with forward(token ids): positions are found, and what mixes tokens elsewhere is refused."""

import pytest
import torch
from bare_modules import CONTEXT, BareLM, OneRowsPositions
from padding import padded

import kvpass
from kvpass.errors import UnsupportedModelError


def ids(batch: int, tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 60, (batch, tokens), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("mask", ["causal", "buffer"])
@pytest.mark.parametrize("positions", ["learned", "table", "none"])
def test_token_by_token_is_the_module_itself(positions: str, mask: str) -> None:
    """Prefill, several tokens, single tokens: the logits of one forward over all of them."""
    module = BareLM(positions, mask)
    model = kvpass.compile(module, press=None, backend="eager", max_tokens=CONTEXT)
    text = ids(3, 40)
    expected = module(text)
    out = model.prefill(text[:, :30])
    torch.testing.assert_close(out.logits[:, -1], expected[:, 29], atol=1e-5, rtol=1e-5)
    cache = out.past_key_values
    middle = model(input_ids=text[:, 30:36], past_key_values=cache).logits
    torch.testing.assert_close(middle, expected[:, 30:36], atol=1e-5, rtol=1e-5)
    for i in range(36, 40):
        last = model(input_ids=text[:, i : i + 1], past_key_values=cache).logits
        torch.testing.assert_close(last[:, 0], expected[:, i], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("positions", ["learned", "table"])
def test_compressed_and_generated(positions: str) -> None:
    """`generate` works without a config, and goes on at the position in the text."""
    module = BareLM(positions)
    model = kvpass.compile(module, press="snapkv(window_size=8)", ratio=0.5, backend="eager", max_tokens=CONTEXT)
    out = model.generate(ids(2, 40), max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
    assert out.sequences.shape == (2, 46)
    cache = out.past_key_values
    assert cache.kept(0) == 20 + 5 and cache.positions(0)[0, 0, -5:].tolist() == [40, 41, 42, 43, 44]


def test_rotating_before_heads_and_tokens_change_places_is_the_same() -> None:
    """The scores read states in front of RoPE, the rotation, and both again for keys that are moved."""
    text = ids(2, 57)
    for press in ("expected_attention(n_future_positions=16)", "key_rerotation(knorm)"):
        caches = []
        for positions in ("table", "early"):
            model = kvpass.compile(BareLM(positions), press, 0.5, backend="eager", max_tokens=CONTEXT)
            caches.append(model.prefill(text).past_key_values)
        for layer in range(2):
            assert torch.equal(caches[0].positions(layer), caches[1].positions(layer))
            torch.testing.assert_close(caches[0].keys(layer), caches[1].keys(layer), atol=1e-5, rtol=1e-5)


def test_the_first_generated_token_is_the_modules() -> None:
    module = BareLM("table")
    model = kvpass.compile(module, press="knorm", ratio=0.5, backend="eager", max_tokens=CONTEXT)
    text = ids(2, 33)
    found = model.generate(text, max_new_tokens=1, do_sample=False)
    assert torch.equal(found[:, -1], module(text)[:, -1].argmax(-1))


@pytest.mark.parametrize("mixing", ["convolution", "shift"])
def test_what_cannot_even_be_captured_for_one_token_is_refused(mixing: str) -> None:
    """These need neighbours that a single token does not have; torch says so in its own way."""
    with pytest.raises(kvpass.KVPassError):
        kvpass.capture_model(BareLM(mixing=mixing), max_tokens=CONTEXT)


@pytest.mark.parametrize("mixing", ["roll", "mean", "norm", "batch"])
def test_what_mixes_tokens_outside_attention_is_refused(mixing: str) -> None:
    """Named with the layer whose attention it reaches first."""
    with pytest.raises(UnsupportedModelError, match=r"layer 1: .* of a token "):
        kvpass.capture_model(BareLM(mixing=mixing), max_tokens=CONTEXT)


def test_positions_that_were_not_found_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"layer 0: .* depends on others, or on its place"):
        kvpass.capture_model(BareLM("counted"), max_tokens=CONTEXT)


@pytest.mark.parametrize("make", [BareLM, OneRowsPositions])
def test_rows_at_different_positions_of_a_model_with_one_for_all(make: type[BareLM]) -> None:
    """They go through the graph one after the other; what each row gets is what it gets alone."""
    model = kvpass.compile(make(), press="knorm", ratio=0.5, backend="eager", max_tokens=CONTEXT)
    rows = [ids(1, n, seed=n)[0] for n in (40, 25)]
    text, mask = padded(rows, "left")
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    found = model.generate(text, attention_mask=mask, **options)[:, 40:]
    for row, tokens in enumerate(rows):
        expected = model.generate(tokens[None], attention_mask=torch.ones(1, len(tokens)), **options)
        assert found[row].tolist() == expected[0, len(tokens) :].tolist()


def test_a_table_that_is_too_short_is_named() -> None:
    with pytest.raises(UnsupportedModelError, match=r"say so with max_tokens="):
        kvpass.capture_model(BareLM("table"))
