"""The compressed cache: what it holds, where in the text that was, and what may be done with it."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from caches import HALF, append, close, content, same
from models import compiled_model, eager_model, token_ids
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kvpass
from kvpass.errors import CacheError, PressError
from kvpass.presses import ExpectedAttention, Knorm, SnapKV, StreamingLLM

PRESSES = [StreamingLLM(), ExpectedAttention(), SnapKV(window_size=8), Knorm()]
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12}


# -- what it holds -------------------------------------------------------------------------------------------------


def test_shapes_and_counts() -> None:
    """Two layers, two KV heads, head size 16; 40 tokens of which half are kept, then 7 appended."""
    model = compiled_model("llama", **HALF)
    cache = model.new_cache()
    assert (len(cache), cache.seen_tokens, cache.batch_size, cache.nbytes) == (2, 0, None, 0)
    cache = model.prefill(token_ids(3, 40)).past_key_values
    append(model, cache, token_ids(3, 7, seed=1))
    assert isinstance(cache, kvpass.CompressedCache)
    assert cache.seen_tokens == cache.get_seq_length() == 47
    assert cache.batch_size == 3
    for layer in range(2):
        assert cache.kept(layer) == 27
        assert cache.keys(layer).shape == cache.values(layer).shape == (3, 2, 27, 16)
        assert cache.positions(layer).shape == (3, 2, 27)
        assert cache.positions(layer).dtype == torch.int64
    assert cache.used_bytes == 2 * 2 * 3 * 2 * 27 * 16 * 4  # layers, K and V, rows, heads, entries, size, float32
    buffers = [buffer for layer in range(2) for buffer in cache.buffers(layer)]
    assert cache.nbytes == sum(buffer.numel() * 4 for buffer in buffers) > cache.used_bytes
    assert "seen_tokens=47" in repr(cache) and "27" in repr(cache)


def test_compression_halves_the_storage() -> None:
    """What a press drops is never allocated."""
    ids = token_ids(1, 3000)
    whole, half = (compiled_model("llama", **options).prefill(ids).past_key_values for options in ({}, HALF))
    assert half.used_bytes * 2 == whole.used_bytes
    assert half.nbytes < whole.nbytes * 0.55


@pytest.mark.parametrize("press", PRESSES, ids=repr)
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_entries_are_those_of_the_text_at_their_positions(name: str, press: kvpass.Press) -> None:
    """Positions ascend; keys and values are the eager model's at these positions, also of what is appended."""
    ids = token_ids(2, 66)
    with torch.no_grad():
        eager = eager_model(name)(ids[:, :50], use_cache=True).past_key_values
        longer = eager_model(name)(ids, use_cache=True).past_key_values
    model = compiled_model(name, press, ratio=0.6)
    cache = model.prefill(ids[:, :50]).past_key_values
    for layer, store in enumerate(eager.layers):
        kept = cache.positions(layer)
        assert bool((kept.diff(dim=-1) > 0).all()) and int(kept.min()) >= 0 and int(kept.max()) < 50
        assert kept.shape[-1] == (20 if cache.layout.layers[layer].pressed else 16)
        if cache.layout.layers[layer].pressed:
            index = kept[..., None].expand(-1, -1, -1, 16)
            close(cache.keys(layer), store.keys.gather(2, index))
            close(cache.values(layer), store.values.gather(2, index))
        else:  # a ring; the reference holds one entry less, as the next token sees 15
            assert torch.equal(kept, torch.arange(34, 50).expand(2, kept.shape[1], -1))
            close(cache.keys(layer)[:, :, 1:], store.keys)
            close(cache.values(layer)[:, :, 1:], store.values)
    before = content(cache)
    for start, end in itertools.pairwise([50, 51, 60, 61, 62, 66]):
        append(model, cache, ids[:, start:end])
    for layer in range(len(cache)):
        kept = cache.positions(layer)
        if not cache.layout.layers[layer].pressed:
            assert torch.equal(kept, torch.arange(50, 66).expand(2, kept.shape[1], -1))
            continue
        assert torch.equal(kept[..., :-16], before[3 * layer + 2])
        assert torch.equal(kept[..., -16:], torch.arange(50, 66).expand(2, kept.shape[1], -1))
        assert torch.equal(cache.keys(layer)[:, :, :-16], before[3 * layer])
        assert torch.equal(cache.values(layer)[:, :, :-16], before[3 * layer + 1])
    # Keys of the first layer depend on the token and its position alone, whatever was dropped before it.
    close(cache.keys(0)[:, :, -15:], longer.layers[0].keys[:, :, -15:])  # gemma's window of 16 leaves 15


def test_presses_choose_for_every_head() -> None:
    """Row, head and layer each have positions of their own."""
    cache = compiled_model("llama", ExpectedAttention(), ratio=0.6).prefill(token_ids(2, 50)).past_key_values
    kept = {tuple(heads.tolist()) for layer in range(2) for row in cache.positions(layer) for heads in row}
    assert len(kept) == 8


# -- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_a_saved_cache_goes_on_as_if_nothing_had_happened(name: str, tmp_path: Path) -> None:
    """The same bits, the same generation, and rewind() leads to the same context."""
    model, context, question = compiled_model(name, **HALF), token_ids(2, 50), token_ids(2, 6, seed=1)
    cache = model.prefill(context).past_key_values
    append(model, cache, question)
    cache.save(tmp_path / "context.safetensors")
    loaded = kvpass.CompressedCache.load(tmp_path / "context.safetensors")
    assert same(content(loaded), content(cache))
    assert (loaded.seen_tokens, loaded.batch_size, len(loaded)) == (56, 2, len(cache))
    text = torch.cat([context, question, token_ids(2, 3, seed=2)], dim=1)
    expected = model.generate(text, past_key_values=cache.copy(), **GREEDY)
    assert torch.equal(model.generate(text, past_key_values=loaded, **GREEDY), expected)
    assert loaded.seen_tokens == 56 + 3 + 11
    assert same(content(loaded.rewind()), content(cache.rewind()))


def test_a_cache_without_compression_can_be_saved(tmp_path: Path) -> None:
    model = compiled_model("llama")
    cache = model.prefill(token_ids(1, 20)).past_key_values
    cache.save(tmp_path / "whole.safetensors")
    loaded = kvpass.CompressedCache.load(tmp_path / "whole.safetensors")
    assert same(content(loaded), content(cache))
    loaded.crop(10)  # nothing was dropped, so this stays allowed
    assert loaded.positions(0)[0, 0].tolist() == list(range(10))


def test_wrong_files_are_refused(tmp_path: Path) -> None:
    """Another safetensors file and a file of another kind: CacheError with the path; an empty cache is not saved."""
    other, text = tmp_path / "model.safetensors", tmp_path / "notes.txt"
    save_file({"weight": torch.zeros(2)}, str(other))
    text.write_text("no tensors in here")
    for path in (other, text):
        with pytest.raises(CacheError, match=rf"{path.name} is not a cache written by CompressedCache\.save"):
            kvpass.CompressedCache.load(path)
    with pytest.raises(CacheError, match="empty cache cannot be saved; prefill it first"):
        compiled_model("llama").new_cache().save(tmp_path / "empty.safetensors")
    with pytest.raises(FileNotFoundError):
        kvpass.CompressedCache.load(tmp_path / "missing.safetensors")


def test_a_loaded_cache_of_another_model_is_refused_when_used(tmp_path: Path) -> None:
    """Llama and Mistral have the same shapes here: only the fingerprint tells them apart."""
    compiled_model("llama", **HALF).prefill(token_ids(1, 20)).past_key_values.save(tmp_path / "a.safetensors")
    loaded = kvpass.CompressedCache.load(tmp_path / "a.safetensors")
    with pytest.raises(CacheError, match=r"belongs to another model.*prefill the text with this one"):
        append(compiled_model("mistral", **HALF), loaded, token_ids(1, 2))
    append(compiled_model("llama"), loaded, token_ids(1, 2))  # another press of the same model may go on
    assert loaded.kept(0) == 12


# -- room to grow --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_growing_changes_nothing(name: str) -> None:
    """400 tokens outgrow what was allocated at first; tokens and content as with room for all from the start."""
    ids, options = token_ids(2, 40), {"do_sample": False, "max_new_tokens": 400, "return_dict_in_generate": True}
    first = compiled_model(name, **HALF).prefill(ids).past_key_values.buffers(1)[0].shape[2]
    grown, roomy = (compiled_model(name, **HALF, **extra).generate(ids, **options) for extra in ({}, {"capacity": 900}))
    assert grown.past_key_values.buffers(1)[0].shape[2] > first
    assert first < 20 + 399
    assert roomy.past_key_values.buffers(1)[0].shape[2] == 900
    assert torch.equal(grown.sequences, roomy.sequences)
    assert same(content(grown.past_key_values)[2::3], content(roomy.past_key_values)[2::3])
    for found, expected in zip(content(grown.past_key_values), content(roomy.past_key_values), strict=True):
        close(found, expected)


def test_growing_gives_the_tokens_of_the_model() -> None:
    """Nothing dropped, 400 tokens: as transformers."""
    options = {"do_sample": False, "max_new_tokens": 400}
    ids = token_ids(1, 30)
    assert torch.equal(compiled_model("llama").generate(ids, **options), eager_model("llama").generate(ids, **options))


def test_growth_is_rare() -> None:
    """Capacities grow in steps: a few times in 400 tokens, not at every one."""
    model = compiled_model("llama", **HALF)
    cache = model.prefill(token_ids(1, 40)).past_key_values
    places = set()
    for _ in range(400):
        append(model, cache, token_ids(1, 1))
        places.add(cache.buffers(0)[0].data_ptr())
    assert 1 < len(places) <= 4


def test_a_fixed_capacity_is_never_exceeded() -> None:
    """Exactly full is allowed; one more is refused with the cure, and the cache is still good."""
    model = compiled_model("llama", **HALF, capacity=64)
    cache = model.prefill(token_ids(1, 60)).past_key_values
    assert all(buffer.shape[2] == 64 for layer in range(2) for buffer in cache.buffers(layer))
    append(model, cache, token_ids(1, 34, seed=1))
    assert cache.kept(0) == 64
    before = content(cache)
    with pytest.raises(CacheError, match=r"64 entries per layer, 65 are needed; compile with a greater capacity="):
        append(model, cache, token_ids(1, 1))
    assert cache.seen_tokens == 94 and same(content(cache), before)
    with pytest.raises(CacheError, match=r"capacity="):
        model.generate(token_ids(1, 60), do_sample=False, max_new_tokens=40)
    with pytest.raises(CacheError, match=r"64 entries per layer, 65 are needed"):
        model.prefill(token_ids(1, 130))


# -- budgets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("press", PRESSES, ids=repr)
def test_target_size(press: kvpass.Press) -> None:
    """Shorter prompts stay whole, all others keep exactly that many."""
    model = compiled_model("llama", press, target_size=30)
    plain = compiled_model("llama")
    for tokens, kept in [(10, 10), (29, 29), (30, 30), (31, 30), (100, 30), (257, 30)]:
        cache = model.prefill(token_ids(2, tokens)).past_key_values
        assert [cache.kept(layer) for layer in range(2)] == [kept, kept]
        if kept == tokens:
            whole = plain.prefill(token_ids(2, tokens)).past_key_values
            for found, expected in zip(content(cache), content(whole), strict=True):
                close(found, expected)


def test_set_budget() -> None:
    """Takes effect at the next prompt, equals a model compiled with that budget, and checks its values."""
    model, ids = compiled_model("llama", ExpectedAttention(), ratio=0.5), token_ids(2, 50)
    assert model.prefill(ids).past_key_values.kept(0) == 25
    for budget, kept in [({"ratio": 0.9}, 4), ({"target_size": 13}, 13), ({"ratio": 0}, 50), ({"ratio": 0.25}, 37)]:
        model.set_budget(**budget)
        cache = model.prefill(ids).past_key_values
        assert cache.kept(0) == kept
        if budget != {"ratio": 0}:
            fresh = compiled_model("llama", ExpectedAttention(), **budget).prefill(ids).past_key_values
            assert same(content(cache), content(fresh))
    for wrong in ({"ratio": 1.0}, {"ratio": -0.1}, {"target_size": 0}, {"ratio": 0.5, "target_size": 3}):
        with pytest.raises(PressError):
            model.set_budget(**wrong)
    assert model.prefill(ids).past_key_values.kept(0) == 37  # a refused budget changes nothing
    with pytest.raises(PressError, match="compiled without a press"):
        compiled_model("llama").set_budget(ratio=0.5)


# -- what a decode step costs --------------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """Notes fresh tensors of at least `size` elements, and refuses to read anything back to the host."""

    READS = frozenset({"_local_scalar_dense", "nonzero", "masked_select", "item", "equal", "is_nonzero"})

    def __init__(self, size: int, known: list[Tensor]) -> None:
        super().__init__()
        self.size, self.fresh, self.calls = size, list[str](), 0
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in self.READS, f"{func} waits for the device"
        self.calls += 1
        inputs = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        known = self.known | {tensor.untyped_storage().data_ptr() for tensor in inputs}
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in known:
                storage = tensor.untyped_storage().nbytes() // tensor.element_size()
                if max(tensor.numel(), storage) >= self.size:
                    self.fresh.append(f"{func} {tuple(tensor.shape)}")
        return result


@pytest.mark.parametrize("options", [{}, HALF], ids=["whole", "pressed"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text"])
def test_a_decode_step_copies_no_cache_and_asks_the_device_nothing(name: str, options: dict[str, Any]) -> None:
    """No operator makes a tensor as large as one layer's keys, none reads a number back; as generate() steps."""
    model, ids = compiled_model(name, **options), token_ids(2, 1500)
    cache = model.prefill(ids).past_key_values
    append(model, cache, ids[:, :1])  # the graph of the phase is built at its first use
    buffers = [buffer for layer in range(len(cache)) for buffer in cache.buffers(layer)]
    size = min(cache.buffers(i)[0].numel() for i in range(len(cache)) if cache.layout.layers[i].ring is None)
    assert size > 2 * 2 * 16 * 700
    token = token_ids(2, 1, seed=1)
    text = torch.cat([ids, ids[:, :1], token], dim=1)
    mask = torch.ones_like(text)
    with Watch(size, [*buffers, *model.parameters()]) as watch:
        inputs = model.prepare_inputs_for_generation(
            text, past_key_values=cache, attention_mask=mask, next_sequence_length=1, use_cache=True
        )
        logits = model(**inputs).logits
    assert watch.calls > 50
    assert watch.fresh == []
    assert logits.shape == (2, 1, 256)
    assert [a.data_ptr() for a in buffers] == [b.data_ptr() for i in range(len(cache)) for b in cache.buffers(i)]
    assert cache.seen_tokens == 1502


def test_the_watch_sees_what_it_should() -> None:
    """The instrument of the test above: views and in-place results are not fresh, copies are; .item() is refused."""
    held = torch.zeros(100)
    with Watch(100, [held]) as watch:
        held.view(10, 10).add_(1)
        held[:50] * 2
        assert watch.fresh == []
        held * 2
        assert len(watch.fresh) == 1
        with pytest.raises(AssertionError, match="waits for the device"):
            held[0].item()
