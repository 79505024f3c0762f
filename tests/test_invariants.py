"""What no press, phase or architecture may break: logits against the eager model, and against a dense reference."""

import copy
import itertools
from typing import Any

import pytest
import torch
from models import compiled_model, eager_model, token_ids
from tiny_models import ARCHITECTURES, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

import kvpass
from kvpass.budget import kept_count
from kvpass.presses import ExpectedAttention, Knorm, StreamingLLM

WINDOW = 16  # of gemma3_text's sliding layers


def assert_logits(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def eager_logits(arch: str, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = eager_model(arch)(ids).logits
    return logits


def decode(model: kvpass.CompiledModel, cache: kvpass.CompressedCache, ids: Tensor) -> Tensor:
    """Logits [B, S, V] of `ids`, given one at a time."""
    steps = [model(input_ids=ids[:, i : i + 1], past_key_values=cache).logits for i in range(ids.shape[1])]
    return torch.cat(steps, dim=1)


def small_model(arch: str, seed: int = 0, **options: Any) -> PreTrainedModel:
    """One full layer, and a sliding one if the architecture has those: quicker to capture."""
    return tiny_model(arch, seed=seed, num_hidden_layers=2 if any(sliding_layers(arch)) else 1, **options)


def sliding_layers(arch: str) -> list[bool]:
    config = eager_model(arch).config
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return [kind == "sliding_attention" for kind in kinds]


def test_prompt_logits_are_those_of_the_model(arch: str) -> None:
    """Without a press, with ratio 0, and with half of the pairs dropped: compression never touches the prompt."""
    models = [
        (compiled_model(arch), 0.0),
        (compiled_model(arch, "random", ratio=0), 0.0),
        (compiled_model(arch, StreamingLLM(), ratio=0.5), 0.5),
        (compiled_model(arch, ExpectedAttention(), ratio=0.5), 0.5),
    ]
    for batch, tokens in [(1, 6), (3, 24), (2, 133)]:
        ids = token_ids(batch, tokens, seed=tokens)
        expected = eager_logits(arch, ids)[:, -1:]
        for model, ratio in models:
            out = model.prefill(ids)
            assert_logits(out.logits, expected)
            kept = [min(tokens, WINDOW) if sliding else kept_count(tokens, ratio) for sliding in sliding_layers(arch)]
            assert [out.past_key_values.kept(layer) for layer in range(len(kept))] == kept


def test_decoding_token_by_token_is_one_forward(arch: str) -> None:
    """Nothing dropped: behind a prompt, and from the very first token on."""
    ids = token_ids(2, 60)
    expected = eager_logits(arch, ids)
    model = compiled_model(arch)
    out = model.prefill(ids[:, :25])
    assert_logits(decode(model, out.past_key_values, ids[:, 25:]), expected[:, 25:])
    assert_logits(decode(model, model.new_cache(), ids), expected)


def test_extending_in_one_piece_is_extending_in_many(arch: str) -> None:
    """Over a compressed cache: the same logits, the same entries, the same positions."""
    model = compiled_model(arch, ExpectedAttention(), ratio=0.5)
    ids = token_ids(2, 90)
    whole = model.prefill(ids[:, :50]).past_key_values
    pieces = whole.copy()
    expected = model(input_ids=ids[:, 50:], past_key_values=whole).logits
    assert expected.shape[1] == 40
    cuts = [50, 52, 53, 72, 79, 80, 90]  # one token is another graph than several
    found = [
        model(input_ids=ids[:, start:end], past_key_values=pieces).logits for start, end in itertools.pairwise(cuts)
    ]
    assert_logits(torch.cat(found, dim=1), expected)
    for layer in range(len(whole)):
        assert torch.equal(pieces.positions(layer), whole.positions(layer))
        torch.testing.assert_close(pieces.keys(layer), whole.keys(layer), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(pieces.values(layer), whole.values(layer), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("batch", "tokens"), [(1, 2), (1, 24), (2, 23), (5, 7), (7, 150), (24, 29)])
def test_sizes_that_capture_has_never_seen(arch: str, batch: int, tokens: int) -> None:
    """Prompt, extension and decode at other sizes than the example's, and with sizes that coincide."""
    ids = token_ids(batch, tokens + tokens + 3, seed=batch)
    expected = eager_logits(arch, ids)
    model = compiled_model(arch)
    out = model.prefill(ids[:, :tokens])
    assert_logits(out.logits, expected[:, tokens - 1 : tokens])
    extended = model(input_ids=ids[:, tokens : 2 * tokens], past_key_values=out.past_key_values).logits
    assert_logits(extended, expected[:, tokens : 2 * tokens])
    assert_logits(decode(model, out.past_key_values, ids[:, 2 * tokens :]), expected[:, 2 * tokens :])


def test_sliding_layers_keep_their_window() -> None:
    """In gemma3_text: a ring of what a token can see, which does not grow; full layers are compressed."""
    model = compiled_model("gemma3_text", StreamingLLM(), ratio=0.75)
    cache = model.prefill(token_ids(1, 100)).past_key_values
    assert sliding_layers("gemma3_text") == [True, False, True, False]
    assert [cache.kept(layer) for layer in range(4)] == [16, 25, 16, 25]
    buffers = [t.data_ptr() for t in cache.buffers(0)]
    decode(model, cache, token_ids(1, 30, seed=1))
    assert [cache.kept(layer) for layer in range(4)] == [16, 55, 16, 55]
    assert torch.equal(cache.positions(0)[0, 0], torch.arange(114, 130))
    assert cache.buffers(0)[0].shape == (1, 2, 16, 16) and [t.data_ptr() for t in cache.buffers(0)] == buffers


def test_windows_are_right_far_beyond_the_window() -> None:
    """Prompt, extension and decode each many times longer than the window of 16."""
    ids = token_ids(2, 13 * WINDOW)
    expected = eager_logits("gemma3_text", ids)
    model = compiled_model("gemma3_text")
    out = model.prefill(ids[:, : 7 * WINDOW])
    assert_logits(out.logits, expected[:, 7 * WINDOW - 1 : 7 * WINDOW])
    extended = model(input_ids=ids[:, 7 * WINDOW : 10 * WINDOW], past_key_values=out.past_key_values).logits
    assert_logits(extended, expected[:, 7 * WINDOW : 10 * WINDOW])
    assert_logits(decode(model, out.past_key_values, ids[:, 10 * WINDOW :]), expected[:, 10 * WINDOW :])


def test_two_models_in_one_process_do_not_disturb_each_other(arch: str) -> None:
    """Used in turns, each gives what its own eager model gives."""
    other = ARCHITECTURES[(ARCHITECTURES.index(arch) + 1) % len(ARCHITECTURES)]
    ids = token_ids(2, 40)
    models, expected = [compiled_model(a) for a in (arch, other)], [eager_logits(a, ids) for a in (arch, other)]
    caches = [model.prefill(ids[:, :30]).past_key_values for model in models]
    for i in range(30, 40):
        for model, cache, logits in zip(models, caches, expected, strict=True):
            assert_logits(decode(model, cache, ids[:, i : i + 1]), logits[:, i : i + 1])


def test_two_models_of_equal_shape_do_not_share_weights() -> None:
    """Two checkpoints of one architecture, captured after each other."""
    ids = token_ids(1, 20)
    twin = tiny_model("llama", seed=1)
    compiled = kvpass.compile(twin, backend="eager")
    with torch.no_grad():
        expected = twin(ids).logits[:, -1:]
    assert not torch.allclose(expected, eager_logits("llama", ids)[:, -1:], atol=0.1)
    assert_logits(compiled_model("llama").prefill(ids).logits, eager_logits("llama", ids)[:, -1:])
    assert_logits(compiled.prefill(ids).logits, expected)


def test_one_model_with_two_presses(arch: str) -> None:
    """Each keeps its own press and budget, also when they are used in turns."""
    ids, question = token_ids(2, 40), token_ids(2, 6, seed=1)

    def answer(model: kvpass.CompiledModel) -> tuple[Tensor, list[Tensor]]:
        cache = model.prefill(ids).past_key_values
        positions = [cache.positions(layer) for layer in range(len(cache))]
        return model(input_ids=question, past_key_values=cache).logits, positions

    first = compiled_model(arch, StreamingLLM(), ratio=0.5)
    logits, positions = answer(first)
    second = compiled_model(arch, ExpectedAttention(), ratio=0.75)
    other_logits, other_positions = answer(second)
    full = sliding_layers(arch).index(False)
    assert positions[full].shape[-1] == 20
    assert other_positions[full].shape[-1] == 10
    assert not torch.allclose(logits, other_logits, atol=1e-2)
    for model, expected, kept in ((first, logits, positions), (second, other_logits, other_positions)):
        again, again_kept = answer(model)
        assert torch.equal(again, expected)
        assert all(torch.equal(a, b) for a, b in zip(again_kept, kept, strict=True))


def test_compile_leaves_the_model_as_it_was(arch: str) -> None:
    """Weights, config, attention implementation, mode and answers: the same bits before and after."""
    model = small_model(arch, seed=5).train()
    state, config = copy.deepcopy(model.state_dict()), copy.deepcopy(model.config.to_dict())
    attention, ids = model.config._attn_implementation, token_ids(2, 33)
    generation = copy.deepcopy(model.generation_config.to_dict())
    tensors = {name: id(parameter) for name, parameter in model.named_parameters()}
    expected = outputs(model, ids)

    compiled = kvpass.compile(model, StreamingLLM(), ratio=0.5, backend="eager")
    compiled.generate(ids, max_new_tokens=3, do_sample=False)

    assert model.training
    assert model.config._attn_implementation == attention
    assert model.config.to_dict() == config
    assert model.generation_config.to_dict() == generation
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == tensors
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(outputs(model, ids), expected, strict=True))


def outputs(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """Logits and greedy tokens in eval mode; the mode is put back."""
    training = model.training
    model.eval()
    with torch.no_grad():
        logits = model(ids).logits
        tokens = model.generate(ids, max_new_tokens=4, do_sample=False)
    model.train(training)
    return [logits, tokens]


# -- a dense reference: the eager model over the whole text, with dropped positions hidden by a mask ---------------


def visible(tokens: int, context: int, dropped: Tensor, window: int | None = None) -> Tensor:
    """What each token of the text may see: all before it, but nothing `dropped` once the context is read. bool[S, S]"""
    key = torch.arange(tokens)
    query = key[:, None]
    hidden = torch.zeros(tokens, dtype=torch.bool)
    hidden[dropped] = True
    seen = (key <= query) & ~((query >= context) & hidden)
    return seen if window is None else (key <= query) & (key > query - window)


def as_bias(mask: Tensor) -> Tensor:
    """bool[..., S, S] as the float mask [B or 1, H or 1, S, S] that eager attention adds to its logits."""
    bias = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    return bias if bias.dim() == 4 else bias[None, None]


def dense_reference(arch: str, ids: Tensor, context: int, dropped: Tensor) -> Tensor:
    model = tiny_model(arch, attn_implementation="eager")
    tokens = ids.shape[1]
    full = as_bias(visible(tokens, context, dropped)).expand(ids.shape[0], 1, -1, -1)
    mask: Tensor | dict[str, Tensor] = full
    if any(sliding_layers(arch)):
        near = as_bias(visible(tokens, context, dropped, WINDOW)).expand(ids.shape[0], 1, -1, -1)
        mask = {"full_attention": full, "sliding_attention": near}
    with torch.no_grad():
        logits: Tensor = model(ids, attention_mask=mask).logits
    return logits


@pytest.mark.parametrize(("context", "kept", "ratio"), [(50, 25, 0.5), (64, 6, 0.9), (31, 23, 0.25)])
def test_a_question_sees_what_was_kept_and_itself(arch: str, context: int, kept: int, ratio: float) -> None:
    """A question of 12 tokens and 8 decoded ones, at their true positions, against the masked eager model."""
    ids = token_ids(2, context + 20, seed=context)
    dropped = torch.arange(4, 4 + context - kept)  # streaming_llm: 4 sinks and the most recent ones stay
    expected = dense_reference(arch, ids, context, dropped)
    assert not torch.allclose(expected, eager_logits(arch, ids), atol=1e-2)  # hiding them makes a difference

    model = compiled_model(arch, StreamingLLM(), ratio=ratio)
    out = model.prefill(ids[:, :context])
    cache = out.past_key_values
    full = sliding_layers(arch).index(False)
    left = torch.cat([torch.arange(4), torch.arange(4 + context - kept, context)])
    assert torch.equal(cache.positions(full), left.expand(2, 2, -1))
    assert_logits(out.logits[:, 0], expected[:, context - 1])
    question = model(input_ids=ids[:, context : context + 12], past_key_values=cache).logits
    assert_logits(question, expected[:, context : context + 12])
    assert_logits(decode(model, cache, ids[:, context + 12 :]), expected[:, context + 12 :])


def test_every_head_and_row_sees_its_own_entries() -> None:
    """A press that drops other positions in each row and KV head: query heads follow the KV head of their group."""
    ids = token_ids(2, 60)
    eager = small_model("llama", attn_implementation="eager")
    model = kvpass.compile(small_model("llama"), Knorm(), ratio=0.6, backend="eager")
    cache = model.prefill(ids[:, :40]).past_key_values
    kept = cache.positions(0)  # [2, 2, 16]
    assert kept.shape == (2, 2, 16)
    masks = []
    for row in range(2):
        for head in range(4):
            stays = torch.isin(torch.arange(40), kept[row, head // 2])
            masks.append(visible(60, 40, torch.arange(40)[~stays]))
    assert not torch.equal(masks[0], masks[2]) and not torch.equal(masks[0], masks[4])
    with torch.no_grad():
        expected = eager(ids, attention_mask=as_bias(torch.stack(masks).unflatten(0, (2, 4)))).logits
    assert_logits(model(input_ids=ids[:, 40:50], past_key_values=cache).logits, expected[:, 40:50])
    assert_logits(decode(model, cache, ids[:, 50:]), expected[:, 50:])


def test_weights_are_shared_not_copied() -> None:
    """Whatever is compiled from a model holds the model's own parameters."""
    originals = {id(parameter) for parameter in eager_model("llama").parameters()}
    for model in (compiled_model("llama"), compiled_model("llama", StreamingLLM(), ratio=0.5)):
        held = {id(parameter) for parameter in model.parameters()}
        assert held and held <= originals
