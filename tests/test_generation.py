"""`generate()` gives what transformers gives, and over a compressed cache what stepping by hand gives."""

import copy
import logging
from typing import Any

import pytest
import torch
from models import compiled_model, eager_model, token_ids
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, StoppingCriteria, StoppingCriteriaList, pipeline, set_seed
from transformers.generation.streamers import BaseStreamer

import kvpass
from kvpass.presses import ExpectedAttention, SnapKV, StreamingLLM

PRESSED: dict[str, Any] = {"press": StreamingLLM(), "ratio": 0.5}
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 24}


def by_hand(
    model: kvpass.CompiledModel, cache: kvpass.CompressedCache, ids: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """Greedy tokens [B, count] and their logits [B, count, V] after appending `ids` to the cache."""
    tokens, scores = [], []
    for _ in range(count):
        scores.append(model(input_ids=ids, past_key_values=cache).logits[:, -1:])
        ids = scores[-1].argmax(-1)
        tokens.append(ids)
    return torch.cat(tokens, dim=1), torch.cat(scores, dim=1)


def test_greedy_tokens_are_those_of_the_model(arch: str) -> None:
    """A batch, and a prompt of a single token."""
    model = compiled_model(arch)
    for ids in (token_ids(2, 37), token_ids(1, 1, seed=1)):
        assert torch.equal(model.generate(ids, **GREEDY), eager_model(arch).generate(ids, **GREEDY))


def test_greedy_over_a_compressed_cache_is_stepping_by_hand(arch: str) -> None:
    """generate() is prefill and decode, nothing else."""
    ids = token_ids(2, 50, seed=1)
    model = compiled_model(arch, **PRESSED)
    tokens, _ = by_hand(model, model.new_cache(), ids, 24)
    assert torch.equal(model.generate(ids, **GREEDY), torch.cat([ids, tokens], dim=1))
    assert not torch.equal(model.generate(ids, **GREEDY), eager_model(arch).generate(ids, **GREEDY))


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_beams_are_those_of_the_model(name: str) -> None:
    """Sequences and scores; the cache follows the beams."""
    options = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 16, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_scores": True}
    ids = token_ids(2, 30)
    found, expected = compiled_model(name).generate(ids, **options), eager_model(name).generate(ids, **options)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.sequences_scores, expected.sequences_scores, atol=1e-4, rtol=1e-4)


def test_beam_scores_over_a_compressed_cache_are_those_of_their_tokens() -> None:
    """The score of every returned beam is the mean log-probability that a fresh run gives its tokens."""
    ids, model = token_ids(1, 40), compiled_model("llama", **PRESSED)
    out = model.generate(
        ids,
        num_beams=3,
        num_return_sequences=3,
        max_new_tokens=12,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    assert len({tuple(row) for row in out.sequences.tolist()}) == 3
    for sequence, score in zip(out.sequences, out.sequences_scores, strict=True):
        first = model.prefill(ids)
        answer = sequence[None, 40:]
        rest = model(input_ids=answer[:, :-1], past_key_values=first.past_key_values).logits
        chances = torch.cat([first.logits, rest], dim=1).log_softmax(-1)
        mean = chances.gather(-1, answer[..., None]).sum() / 12
        torch.testing.assert_close(score, mean, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_sampling_with_the_same_seed_gives_the_same_tokens(name: str) -> None:
    """Plain, and with three sequences for each prompt."""
    options: dict[str, Any] = {"do_sample": True, "max_new_tokens": 20, "temperature": 1.3, "top_k": 50, "top_p": 0.95}
    ids = token_ids(2, 30)
    for extra in ({}, {"num_return_sequences": 3}):
        set_seed(11)
        found = compiled_model(name).generate(ids, **options, **extra)
        set_seed(11)
        assert torch.equal(found, eager_model(name).generate(ids, **options, **extra))
        set_seed(12)
        assert not torch.equal(found, compiled_model(name).generate(ids, **options, **extra))


def test_several_sequences_of_a_pressed_model_are_rows_of_a_batch() -> None:
    """num_return_sequences=3 is the prompt given three times."""
    ids, model = token_ids(1, 40), compiled_model("llama", **PRESSED)
    set_seed(5)
    found = model.generate(ids, do_sample=True, max_new_tokens=12, num_return_sequences=3)
    set_seed(5)
    assert torch.equal(found, model.generate(ids.repeat(3, 1), do_sample=True, max_new_tokens=12))
    assert len({tuple(row) for row in found.tolist()}) == 3


class Recorder(BaseStreamer):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.given: list[list[int]] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        self.given.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended += 1


def test_a_streamer_gets_the_prompt_and_then_every_token() -> None:
    streamer, ids = Recorder(), token_ids(1, 20)
    out = compiled_model("llama", **PRESSED).generate(ids, streamer=streamer, **GREEDY)
    assert streamer.given == [ids[0].tolist(), *([token] for token in out[0, 20:].tolist())]
    assert streamer.ended == 1


class StopAt(StoppingCriteria):
    """Ends a row at its first generated `token`."""

    def __init__(self, token: int, prompt: int) -> None:
        self.token, self.prompt = token, prompt

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Tensor:
        return (input_ids[:, self.prompt :] == self.token).any(dim=1)


@pytest.mark.parametrize("options", [{}, PRESSED], ids=["whole", "pressed"])
def test_stopping_criteria_and_eos_stop(options: dict[str, Any]) -> None:
    """Both end with the token that they wait for."""
    model, ids = compiled_model("llama", **options), token_ids(1, 30)
    whole = model.generate(ids, **GREEDY)
    token = int(whole[0, 30 + 9])
    end = 30 + whole[0, 30:].tolist().index(token) + 1
    stops = StoppingCriteriaList([StopAt(token, 30)])
    assert torch.equal(model.generate(ids, stopping_criteria=stops, **GREEDY), whole[:, :end])
    assert torch.equal(model.generate(ids, eos_token_id=token, **GREEDY), whole[:, :end])


def test_rows_that_ended_are_padded() -> None:
    """One row meets its end token early, the other goes on; as in transformers."""
    ids = token_ids(2, 30)
    token = int(eager_model("llama").generate(ids, **GREEDY)[1, 35])
    options = {**GREEDY, "eos_token_id": token, "pad_token_id": 0}
    expected = eager_model("llama").generate(ids, **options)
    assert (expected[1] == 0).any() and not (expected[0] == 0).any()
    assert torch.equal(compiled_model("llama").generate(ids, **options), expected)


def test_the_output_dictionary_holds_scores_logits_and_the_cache() -> None:
    options = {**GREEDY, "return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    ids = token_ids(2, 30)
    options |= {"repetition_penalty": 1.2}  # so that scores are not the logits
    found, expected = compiled_model("llama").generate(ids, **options), eager_model("llama").generate(ids, **options)
    assert torch.equal(found.sequences, expected.sequences)
    for name in ("scores", "logits"):
        assert len(found[name]) == 24
        torch.testing.assert_close(torch.stack(found[name]), torch.stack(expected[name]), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found.scores[0], found.logits[0])
    assert isinstance(found.past_key_values, kvpass.CompressedCache)
    assert found.past_key_values.seen_tokens == 30 + 23  # the last token was never read


@pytest.mark.parametrize("press", [None, StreamingLLM(), ExpectedAttention(), SnapKV(window_size=8)], ids=repr)
def test_rows_of_a_batch_are_what_each_prompt_gives_alone(press: kvpass.Press | None) -> None:
    model = compiled_model("llama", press, ratio=None if press is None else 0.5)
    ids = token_ids(4, 33)
    together = model.generate(ids, **GREEDY)
    alone = [model.generate(ids[row : row + 1], **GREEDY) for row in range(4)]
    assert torch.equal(together, torch.cat(alone))


def test_without_a_cache_every_step_reads_the_whole_text() -> None:
    """use_cache=False: nothing is ever read from a compressed cache, so the tokens are the model's own."""
    ids = token_ids(1, 30)
    found = compiled_model("llama", **PRESSED).generate(ids, use_cache=False, **GREEDY)
    assert torch.equal(found, eager_model("llama").generate(ids, **GREEDY))


# -- several turns -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_a_second_turn_is_one_run_over_all_tokens(name: str) -> None:
    """Nothing dropped: go on with the returned cache, give all tokens and the new ones."""
    model, ids, question = compiled_model(name), token_ids(2, 30), token_ids(2, 9, seed=1)
    first = model.generate(ids, return_dict_in_generate=True, **GREEDY)
    text = torch.cat([first.sequences, question], dim=1)
    found = model.generate(text, past_key_values=first.past_key_values, **GREEDY)
    assert torch.equal(found, eager_model(name).generate(text, **GREEDY))


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_a_second_turn_over_a_compressed_cache_is_stepping_by_hand(name: str) -> None:
    """The context is compressed once; the second turn is appended whole."""
    model, ids, question = compiled_model(name, **PRESSED), token_ids(2, 40), token_ids(2, 9, seed=1)
    first = model.generate(ids, return_dict_in_generate=True, **GREEDY)
    text = torch.cat([first.sequences, question], dim=1)
    found = model.generate(text, past_key_values=first.past_key_values, **GREEDY)

    cache = model.new_cache()
    answer, _ = by_hand(model, cache, ids, 24)
    assert torch.equal(first.sequences[:, 40:], answer)
    second, _ = by_hand(model, cache, torch.cat([answer[:, -1:], question], dim=1), 24)
    assert torch.equal(found, torch.cat([text, second], dim=1))
    full = model.config.num_hidden_layers - 1  # gemma's last layer is a full one
    assert first.past_key_values.kept(full) == cache.kept(full) == 20 + 24 + 9 + 23


@pytest.mark.parametrize("options", [{}, PRESSED], ids=["whole", "pressed"])
@pytest.mark.parametrize("tokens", [1, 9, 80])
def test_a_second_turn_with_the_new_tokens_alone(tokens: int, options: dict[str, Any]) -> None:
    """As in transformers: what the cache has not seen, be it longer than all it has; and the whole text's mask."""
    model, ids, question = compiled_model("llama", **options), token_ids(2, 30), token_ids(2, tokens, seed=1)
    first = model.generate(ids, return_dict_in_generate=True, **GREEDY)
    text = torch.cat([first.sequences, question], dim=1)
    cache = first.past_key_values
    expected = model.generate(text, past_key_values=cache.copy(), **GREEDY)
    new = text[:, cache.seen_tokens :]
    found = model.generate(new, attention_mask=torch.ones_like(text), past_key_values=cache.copy(), **GREEDY)
    assert torch.equal(found[:, : new.shape[1]], new)
    assert torch.equal(found[:, new.shape[1] :], expected[:, text.shape[1] :])


@pytest.mark.parametrize("options", [{}, PRESSED], ids=["whole", "pressed"])
def test_a_second_turn_with_prompt_lookup(options: dict[str, Any]) -> None:
    """What the cache has seen is not read a second time."""
    model, ids = compiled_model("llama", **options), token_ids(1, 30)
    greedy = {**GREEDY, "eos_token_id": 2}
    first = model.generate(ids, return_dict_in_generate=True, **greedy)
    text = torch.cat([first.sequences, ids[:, :9]], dim=1)
    expected = model.generate(text, past_key_values=first.past_key_values.copy(), **greedy)
    found = model.generate(text, past_key_values=first.past_key_values, prompt_lookup_num_tokens=2, **greedy)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("options", [{}, PRESSED], ids=["whole", "pressed"])
def test_a_prompt_in_chunks(options: dict[str, Any]) -> None:
    """The first chunk is the prompt, the others are appended to it."""
    model, ids = compiled_model("llama", **options), token_ids(1, 50)
    cache = model.prefill(ids[:, :20]).past_key_values
    tokens, _ = by_hand(model, cache, ids[:, 20:], 24)
    assert torch.equal(model.generate(ids, prefill_chunk_size=20, **GREEDY), torch.cat([ids, tokens], dim=1))


def test_several_questions_share_one_compressed_context() -> None:
    """Through rewind() and through copy(): the answers of a fresh prefill, in any order."""
    model, context = compiled_model("llama", **PRESSED), token_ids(1, 60)
    questions = [token_ids(1, length, seed=length) for length in (7, 1, 12, 7)]
    texts = [torch.cat([context, question], dim=1) for question in questions]
    fresh = [
        torch.cat([text, by_hand(model, model.prefill(context).past_key_values, question, 24)[0]], dim=1)
        for text, question in zip(texts, questions, strict=True)
    ]
    cache = model.prefill(context).past_key_values
    copied = [model.generate(text, past_key_values=cache.copy(), **GREEDY) for text in texts]
    rewound = [model.generate(text, past_key_values=cache.rewind(), **GREEDY) for text in texts]
    for found in (copied, rewound):
        assert all(torch.equal(a, b) for a, b in zip(found, fresh, strict=True))
    assert len({tuple(text[0, -24:].tolist()) for text in fresh}) > 1


# -- prompts that are too short to compress ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("press", "tokens"),
    [(StreamingLLM(), 1), (StreamingLLM(), 2), (StreamingLLM(), 4), (SnapKV(window_size=8), 8), (SnapKV(), 64)],
    ids=lambda value: repr(value),
)
def test_a_short_prompt_is_kept_whole(press: kvpass.Press, tokens: int, caplog: pytest.LogCaptureFixture) -> None:
    """One log line says so, and everything after it is as without a press."""
    model, plain = compiled_model("llama", press, ratio=0.5), compiled_model("llama")
    ids, more = token_ids(2, tokens), token_ids(2, 70, seed=1)
    with caplog.at_level(logging.INFO, logger="kvpass"):
        found = model.generate(ids, return_dict_in_generate=True, output_logits=True, **GREEDY)
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("kvpass.runtime")]
    assert lines == [f"a prompt of {tokens} tokens is kept whole: {press.name} needs {press.min_tokens}"]
    expected = plain.generate(ids, return_dict_in_generate=True, output_logits=True, **GREEDY)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), atol=1e-4, rtol=1e-4)
    assert [found.past_key_values.kept(layer) for layer in range(2)] == [tokens + 23] * 2
    logits = [
        m(input_ids=more, past_key_values=o.past_key_values).logits for m, o in ((model, found), (plain, expected))
    ]
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)
    assert found.past_key_values.kept(0) == tokens + 23 + 70


@pytest.mark.parametrize("tokens", [1, 2, 4, 5, 9])
def test_a_prompt_gives_the_logits_of_its_last_token(tokens: int) -> None:
    """Kept whole or compressed: [B, 1, V], the model's own."""
    ids = token_ids(2, tokens)
    logits = compiled_model("llama", **PRESSED).prefill(ids).logits
    with torch.no_grad():
        expected = eager_model("llama")(ids).logits[:, -1:]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_the_shortest_compressible_prompt_is_compressed(caplog: pytest.LogCaptureFixture) -> None:
    """Exactly min_tokens: no log line, and half of it is left."""
    for press in (StreamingLLM(), SnapKV(window_size=8)):
        model = compiled_model("llama", press, ratio=0.5)
        cache = model.prefill(token_ids(2, press.min_tokens)).past_key_values
        assert cache.kept(0) == press.min_tokens // 2
    assert not [record for record in caplog.records if record.name.startswith("kvpass.runtime")]


# -- what else people do with a model of transformers --------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, PRESSED], ids=["whole", "pressed"])
@pytest.mark.parametrize("repeating", [False, True], ids=["plain", "repeating"])
def test_prompt_lookup_gives_the_greedy_tokens(repeating: bool, options: dict[str, Any]) -> None:
    """Candidates from the prompt itself, also in the very first step, where they come with the prompt."""
    ids = token_ids(1, 6).repeat(1, 5) if repeating else token_ids(1, 30)
    model, greedy = compiled_model("llama", **options), {**GREEDY, "eos_token_id": 2}
    expected = model.generate(ids, **greedy)
    for candidates in (1, 2, 5):
        assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=candidates, **greedy), expected)
    if not options:
        assert torch.equal(eager_model("llama").generate(ids, prompt_lookup_num_tokens=2, **greedy), expected)


@pytest.mark.parametrize("options", [{}, PRESSED], ids=["whole", "pressed"])
@pytest.mark.parametrize("assistant", ["llama", "mistral"], ids=["itself", "another"])
def test_an_assistant_does_not_change_the_greedy_tokens(assistant: str, options: dict[str, Any]) -> None:
    """Whether its candidates are right, as those of the same model are, or wrong."""
    model, ids = compiled_model("llama", **options), token_ids(1, 30)
    helper = copy.deepcopy(eager_model(assistant))  # transformers notes in it how many candidates were right
    found = model.generate(ids, assistant_model=helper, **GREEDY)
    assert torch.equal(found, model.generate(ids, **GREEDY))


def test_as_many_logits_of_a_prompt_as_were_asked_for() -> None:
    """`logits_to_keep` is what assisted decoding checks its candidates with."""
    ids = token_ids(2, 30)
    with torch.no_grad():
        expected = eager_model("llama")(ids).logits
    for count in (1, 2, 7):
        logits = compiled_model("llama")(input_ids=ids, logits_to_keep=count).logits
        torch.testing.assert_close(logits, expected[:, -count:], atol=1e-4, rtol=1e-4)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word: w3 ... w255."""
    words = {"<pad>": 0, "<s>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, 256)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
    fast.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    return fast


def test_the_text_generation_pipeline() -> None:
    """Text, several texts, and a chat, over a compressed cache; nothing dropped gives the model's own words."""
    tokenizer, ids = word_tokenizer(), token_ids(2, 24)
    texts = [" ".join(f"w{token}" for token in row) for row in ids.tolist()]

    def words(tokens: Tensor) -> list[str]:
        return tokenizer.decode(tokens[24:], skip_special_tokens=True).split()

    plain = pipeline("text-generation", model=compiled_model("llama"), tokenizer=tokenizer)
    (answer,) = plain(texts[0], return_full_text=False, **GREEDY)
    assert answer["generated_text"].split() == words(eager_model("llama").generate(ids[:1], **GREEDY)[0])

    model = compiled_model("llama", **PRESSED)
    expected = [words(row) for row in model.generate(ids, **GREEDY)]
    pressed = pipeline("text-generation", model=model, tokenizer=tokenizer)
    answers = pressed(texts, return_full_text=False, **GREEDY)
    assert [answer["generated_text"].split() for (answer,) in answers] == expected
    question = {"role": "user", "content": texts[0]}
    (reply,) = pressed([question], **GREEDY)
    first, second = reply["generated_text"]
    assert first == question
    assert (second["role"], second["content"].split()) == ("assistant", expected[0])


def test_generation_defaults_are_a_copy() -> None:
    """Changing those of the compiled model leaves the original alone, and they are used."""
    model, before = compiled_model("llama"), eager_model("llama").generation_config.max_new_tokens
    model.generation_config.max_new_tokens = 3
    assert model.generate(token_ids(1, 10), do_sample=False).shape == (1, 13)
    assert eager_model("llama").generation_config.max_new_tokens == before
    assert compiled_model("llama").generation_config.max_new_tokens == before
