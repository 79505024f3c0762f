"""Every bad input is refused with one clear sentence that names the cure; nothing is silently ignored."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import captured_model, compiled_model, eager_model, token_ids
from modules import PlainAttentionLayer, PlainLM
from torch import Tensor, nn
from transformers import DynamicCache

import kvpass
from kvpass.budget import Budget
from kvpass.errors import CacheError, InputError, MissingTapError, PressError, UnsupportedModelError
from kvpass.press import Press, ScorerPress
from kvpass.press_inputs import PressInputs
from kvpass.presses import ExpectedAttention, Knorm, SnapKV, StreamingLLM

HALF: dict[str, Any] = {"press": StreamingLLM(), "ratio": 0.5}


@contextmanager
def refused(kind: type[Exception], match: str) -> Iterator[None]:
    """Raises exactly `kind`, with one line of text."""
    with pytest.raises(kind, match=match) as caught:
        yield
    assert caught.type is kind
    assert len(str(caught.value).splitlines()) == 1


def readable(value: object) -> str:
    """Names a case by its options, not by the message expected."""
    named = value.items() if isinstance(value, dict) else ()
    return ",".join(f"{k}={getattr(v, '__name__', repr(v))}" for k, v in named)


# -- options of compile --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"press": "snapvk", "ratio": 0.5}, r"there is no press 'snapvk'; did you mean 'snapkv'"),
        ({"press": "expected", "ratio": 0.5}, r"no press 'expected'; did you mean .*'expected_attention'"),
        ({"press": "KNorm", "ratio": 0.5}, r"no press 'KNorm'; did you mean .*'knorm'"),
        ({"press": "zzz", "ratio": 0.5}, r"no press 'zzz'; known are .*expected_attention.*knorm.*streaming_llm"),
        ({"press": Knorm, "ratio": 0.5}, r"press=Knorm is a class; give an object: Knorm\(\)"),
        ({"press": 7, "ratio": 0.5}, r"press is a int, expected a name, a kvpass or kvpress press, or None"),
        ({"ratio": 0.5}, r"ratio=0.5.* without a press: say which, e\.g\. press='snapkv'"),
        ({"target_size": 64}, r"target_size=64 without a press: say which"),
        ({"press": "knorm"}, r"press 'knorm' without a budget: give ratio= .* or target_size="),
        ({"press": "knorm", "ratio": 0.5, "target_size": 9}, r"ratio=0.5 and target_size=9: give one of them"),
        ({"press": "knorm", "ratio": 1.0}, r"ratio is 1.0, expected 0 <= ratio < 1: it is the fraction removed"),
        ({"press": "knorm", "ratio": -0.5}, r"ratio is -0.5, expected 0 <= ratio < 1"),
        ({"press": "knorm", "ratio": 50}, r"ratio is 50, expected 0 <= ratio < 1"),
        ({"press": "knorm", "ratio": "0.5"}, r"ratio is '?0.5'?, expected"),
        ({"press": "knorm", "target_size": 0}, r"target_size is 0, expected at least 1"),
        ({"press": "knorm", "target_size": 0.5}, r"target_size is 0.5, expected"),
        ({"press": "knorm", "target_size": 30.5}, r"target_size is 30.5, expected"),
    ],
    ids=readable,
)
def test_bad_options_are_refused_before_anything_is_captured(options: dict[str, Any], message: str) -> None:
    """The model given here could not even be captured."""
    with refused(PressError, message):
        kvpass.compile(nn.Linear(2, 2), backend="eager", **options)


@settings(deadline=None)
@given(st.floats(allow_nan=True, allow_infinity=True).filter(lambda ratio: not 0 <= ratio < 1))
def test_no_ratio_outside_the_range_is_accepted(ratio: float) -> None:
    """Neither at compile time nor later."""
    with refused(PressError, r"expected 0 <= ratio < 1: it is the fraction removed, 0\.5 keeps half"):
        kvpass.compile(captured_model("llama"), press="knorm", ratio=ratio, backend="eager")
    with refused(PressError, r"expected 0 <= ratio < 1"):
        Budget(ratio)


@settings(deadline=None)
@given(st.integers(max_value=0))
def test_no_target_below_one_is_accepted(size: int) -> None:
    with refused(PressError, r"target_size is .*, expected at least 1 pair"):
        Budget(target_size=size)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SnapKV(kernel_size=4), r"snapkv: .*kernel_size=4; expected .* odd kernel"),
        (lambda: SnapKV(kernel_size=-1), r"snapkv: .*kernel_size=-1; expected"),
        (lambda: SnapKV(window_size=0), r"snapkv: window_size=0.*; expected a window of at least 1"),
        (lambda: StreamingLLM(n_sink=-1), r"streaming_llm: n_sink is -1, expected 0 or more"),
        (lambda: ExpectedAttention(n_sink=-1), r"expected_attention: .*n_sink=-1; expected .*at least 0"),
        (lambda: ExpectedAttention(n_future_positions=0), r"expected_attention: n_future_positions=0.*at least 1"),
    ],
    ids=["even kernel", "negative kernel", "no window", "streaming_llm sinks", "expected_attention sinks", "no future"],
)
def test_invalid_hyper_parameters(make: Callable[[], Press], message: str) -> None:
    with refused(PressError, message):
        make()


def test_a_model_must_be_a_module() -> None:
    """The name of a checkpoint is what people of transformers try first."""
    with pytest.raises(kvpass.KVPassError, match=r"str"):
        kvpass.compile("some/checkpoint", press="knorm", ratio=0.5)  # type: ignore[arg-type]


# -- models --------------------------------------------------------------------------------------------------------


class NoAttention(nn.Module):
    """Tokens and positions, but no attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(64, 8), nn.Linear(8, 64)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.embed(input_ids) + position_ids[..., None])
        return logits


class NoInput(NoAttention):
    """A forward without arguments."""

    def forward(self) -> Tensor:  # type: ignore[override]
        return super().forward(torch.zeros(1, 4, dtype=torch.int64), torch.arange(4)[None])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (NoAttention(), r"no attention found.*let the model call torch\.nn\.functional\.scaled_dot_product_attention"),
        (NoInput(), r"NoInput\.forward takes nothing, expected token ids"),
        (PlainLM("causal", "bidirectional"), r"layer 1: .*tokens see the future"),
        (PlainLM("causal", "dilated"), r"layer 1: .*mask .* is neither causal nor a sliding window nor chunks"),
    ],
    ids=["no attention", "no input", "bidirectional", "dilated"],
)
def test_models_that_cannot_be_compiled(model: nn.Module, message: str) -> None:
    """Refused, with the layer, also when nothing is to be dropped; never compiled without compression."""
    with refused(UnsupportedModelError, message):
        kvpass.compile(model, backend="eager")


def test_a_model_of_sliding_windows_alone_leaves_nothing_to_press() -> None:
    model = kvpass.capture_model(PlainLM("window"))
    with refused(PressError, r"knorm: every layer of this model has a sliding window.*use press=None"):
        kvpass.compile(model, "knorm", 0.5, backend="eager")
    assert kvpass.compile(model, backend="eager").prefill(token_ids(1, 40) % 60).logits.shape == (1, 1, 64)


# -- presses and the tensors that they read ------------------------------------------------------------------------


class OddQueries(PlainAttentionLayer):
    """Its queries are positional, but not by a rotation of one tensor: there is no state before RoPE.

    two: cos and sin meet two different projections; tanh, norm: the rotated queries are bent once more.
    """

    def __init__(self, how: str) -> None:
        super().__init__("causal")
        self.how, self.other = how, nn.Linear(32, 32, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, other = (p(x).view(batch, tokens, 4, 8).transpose(1, 2) for p in (self.q_proj, self.other))
        k, v = (p(x).view(batch, tokens, 2, 8).transpose(1, 2) for p in (self.k_proj, self.v_proj))
        k, turned = (t * cos + torch.cat([-t[..., 4:], t[..., :4]], dim=-1) * sin for t in (k, q))
        match self.how:
            case "two":
                q = q * cos + other * sin
            case "tanh":
                q = turned.tanh()
            case "norm":
                q = turned * torch.rsqrt(turned.pow(2).mean(-1, keepdim=True) + 1e-6)
        return x + self.o_proj(self.attend(q, k, v).transpose(1, 2).reshape(batch, tokens, 32))


@pytest.mark.parametrize("how", ["two", "tanh", "norm"])
def test_a_press_that_reads_a_missing_tap_fails_at_compile_time(how: str) -> None:
    """The layer is named; presses that do not read RoPE compress the same model."""
    model = PlainLM("causal", "causal")
    model.layers[1] = OddQueries(how)
    captured = kvpass.capture_model(model)
    pressed = kvpass.compile(captured, Knorm(), 0.5, backend="eager")
    assert pressed.prefill(token_ids(1, 40) % 60).past_key_values.kept(1) == 20
    with refused(MissingTapError, r"layer 1: "):
        kvpass.compile(captured, ExpectedAttention(), 0.5, backend="eager")


@dataclass(frozen=True)
class WrongShape(ScorerPress):
    """Scores query heads instead of KV heads."""

    name = "wrong_shape"

    def score(self, x: PressInputs) -> Tensor:
        return x.queries.sum(-1)


def test_a_press_that_scores_something_else_is_refused() -> None:
    """With what it returned and what was expected."""
    message = r"wrong_shape: layer 0: score\(\) returned \(.*, 4, .*\), expected \[B, Hkv, S\] = \(.*, 2, .*\)"
    with refused(PressError, message):
        kvpass.compile(captured_model("llama"), WrongShape(), 0.5, backend="eager")


def test_a_field_that_was_not_given_is_named() -> None:
    """Presses run on plain tensors too; what is missing is said with what there is."""
    x = PressInputs({"keys": torch.zeros(1, 2, 9, 4)}, layer=3)
    with refused(MissingTapError, r"layer 3: the press reads 'values', given are \['keys'\]"):
        _ = x.values
    with refused(MissingTapError, r"layer 3: the press reads 'rope', none is given"):
        _ = x.rope
    with refused(MissingTapError, r"layer 3: the press reads size 'budget', given are \[\]"):
        _ = x.budget


def test_a_name_can_be_registered_once() -> None:
    """By another class: refused with the owner of the name. By the same class: a module that was loaded again."""
    with refused(PressError, r"the press name 'knorm' is taken by kvpass\.presses\.knorm\.Knorm"):
        kvpass.register_press("knorm")(WrongShape)
    kvpass.register_press("wrong_shape")(WrongShape)
    kvpass.register_press("wrong_shape")(WrongShape)
    assert kvpass.registered_presses()["wrong_shape"] is WrongShape


# -- inputs of the compiled model ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ids",
    [
        torch.zeros(1, 5),
        torch.zeros(5, dtype=torch.int64),
        torch.zeros(1, 2, 3, dtype=torch.int64),
        torch.zeros(2, 0, dtype=torch.int64),
        torch.zeros(1, 5, dtype=torch.bool),
        [[3, 4, 5]],
        None,
    ],
    ids=["float", "1-D", "3-D", "no token", "bool", "list", "nothing"],
)
def test_input_ids_must_be_token_ids(ids: Any) -> None:
    for model in (compiled_model("llama"), compiled_model("llama", **HALF)):
        with refused(InputError, r"input_ids must be token ids \[batch, tokens\] with at least one token, found"):
            model(input_ids=ids)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("position_ids", torch.arange(9)[None]),
        ("pixel_values", torch.zeros(1, 3, 8, 8)),
        ("labels", torch.zeros(1, 9, dtype=torch.int64)),
        ("output_attentions", True),
        ("output_hidden_states", True),
        ("head_mask", torch.ones(2)),
        ("invented", 1),
    ],
)
def test_arguments_that_a_graph_cannot_take(name: str, value: Any) -> None:
    """Named; where there is something to do instead, that is said. None and False ask for nothing."""
    model = compiled_model("llama", **HALF)
    with refused(InputError, rf"a compiled model does not take {name}"):
        model(input_ids=token_ids(1, 9), **{name: value})
    assert model(input_ids=token_ids(1, 9), **{name: None}).logits.shape == (1, 1, 256)


def test_positions_are_counted_not_taken() -> None:
    with refused(InputError, r"does not take position_ids; positions are counted from what the cache has seen"):
        compiled_model("llama")(input_ids=token_ids(1, 9), position_ids=torch.arange(9)[None])


def test_generate_refuses_what_the_graph_cannot_give() -> None:
    with refused(InputError, r"does not take output_attentions"):
        compiled_model("llama").generate(
            token_ids(1, 9), max_new_tokens=2, output_attentions=True, return_dict_in_generate=True
        )


@pytest.mark.parametrize("shape", [(2, 1, 9, 9), (9,), (2, 7), (2, 11), (3, 9)], ids=str)
def test_masks_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    """All ones, but not for these 2 rows of 9 tokens: something went wrong before."""
    with refused(InputError, r"attention_mask must be \[batch, tokens\], found"):
        compiled_model("llama", **HALF)(input_ids=token_ids(2, 9), attention_mask=torch.ones(shape))


def test_the_mask_of_the_whole_text_is_accepted() -> None:
    """That of a prompt, and behind a cache that of all tokens so far and the new ones."""
    model, ids = compiled_model("llama", **HALF), token_ids(2, 20)
    cache = model(input_ids=ids[:, :15], attention_mask=torch.ones(2, 15)).past_key_values
    twin = cache.copy()
    found = model(input_ids=ids[:, 15:], attention_mask=torch.ones(2, 20), past_key_values=cache).logits
    assert torch.equal(found, model(input_ids=ids[:, 15:], past_key_values=twin).logits)


def test_texts_beyond_the_models_positions_are_refused() -> None:
    """At once, behind a cache, and in the middle of generate(): 4096 positions and not one more."""
    model, ids = compiled_model("llama", **HALF), token_ids(1, 4097)
    message = r"the text is 4097 tokens long, the model's positions end at 4096; shorten the text"
    with refused(InputError, message):
        model.prefill(ids)
    cache = model.prefill(ids[:, :4090]).past_key_values
    with refused(InputError, message):
        model(input_ids=ids[:, :7], past_key_values=cache)
    with refused(InputError, message):
        model.generate(ids[:, :4091], past_key_values=cache.copy(), max_new_tokens=9, do_sample=False)
    assert model(input_ids=ids[:, :6], past_key_values=cache).past_key_values.seen_tokens == 4096


# -- caches --------------------------------------------------------------------------------------------------------


def test_a_cache_of_another_model_is_refused() -> None:
    """Same shapes, other weights."""
    cache = compiled_model("mistral").prefill(token_ids(1, 9)).past_key_values
    message = r"the cache belongs to another model .*prefill the text with this one"
    with refused(CacheError, message):
        compiled_model("llama")(input_ids=token_ids(1, 3), past_key_values=cache)
    with refused(CacheError, message):
        compiled_model("llama").generate(token_ids(1, 12), past_key_values=cache, max_new_tokens=2)


def test_a_cache_of_transformers_is_refused() -> None:
    """Empty or filled."""
    ids = token_ids(1, 9)
    filled = eager_model("llama")(ids, use_cache=True).past_key_values
    message = r"past_key_values is a DynamicCache; a compiled model goes on with a CompressedCache, as prefill\(\)"
    for cache in (DynamicCache(), filled):
        with refused(CacheError, message):
            compiled_model("llama")(input_ids=ids, past_key_values=cache)
    with refused(CacheError, message):
        compiled_model("llama").generate(ids, past_key_values=DynamicCache(), max_new_tokens=2)


def test_a_cache_of_another_batch_size_is_refused() -> None:
    """An empty cache has none yet."""
    model = compiled_model("llama", **HALF)
    cache = model.prefill(token_ids(2, 20)).past_key_values
    for tokens in (1, 4):
        with refused(CacheError, r"the cache holds 2 rows, the new tokens 3; cache\.batch_repeat_interleave\(n\)"):
            model(input_ids=token_ids(3, tokens), past_key_values=cache)
    assert cache.seen_tokens == 20
    assert model(input_ids=token_ids(3, 8), past_key_values=model.new_cache()).logits.shape == (3, 1, 256)


@pytest.mark.parametrize("tokens", [20, 17, 1])
def test_generate_wants_more_tokens_than_the_cache_has_seen(tokens: int) -> None:
    """All tokens so far and the new ones; a text that was read already holds nothing new."""
    model, ids = compiled_model("llama", **HALF), token_ids(1, 20)
    cache = model.prefill(ids).past_key_values
    message = rf"cache has seen 20 tokens, input_ids hold {tokens}: give all tokens so far and the new ones"
    with refused(InputError, message):
        model.generate(ids[:, :tokens], past_key_values=cache, max_new_tokens=2)
    assert cache.seen_tokens == 20


# -- the compiled model as a module --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "move",
    [lambda m: m.to(torch.float64), lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.to("meta")],
    ids=["to(float64)", "half", "to(bfloat16)", "to(meta)"],
)
def test_a_compiled_model_is_neither_cast_nor_moved(move: Callable[[nn.Module], object]) -> None:
    """Its weights are the original model's: they stay as they were."""
    model = compiled_model("llama", **HALF)
    with refused(RuntimeError, r"stays on cpu in torch\.float32.*Move or cast the original model and compile that"):
        move(model)
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.float32, "cpu")}
    assert {p.dtype for p in eager_model("llama").parameters()} == {torch.float32}


def test_moves_to_where_it_is_are_allowed() -> None:
    """Pipelines and trainers call these."""
    model, ids = compiled_model("llama", **HALF), token_ids(1, 20)
    expected = model.prefill(ids).logits
    assert model.to("cpu").to(torch.float32).float().cpu().eval().requires_grad_(False) is model
    assert torch.equal(model.prefill(ids).logits, expected)


def test_unknown_phases_layers_and_passes_are_named() -> None:
    model = compiled_model("llama", **HALF)
    with refused(ValueError, r"there is no phase 'warmup'; phases are prefill, extend, decode"):
        model.graph("warmup")
    with refused(ValueError, r"there is no layer 2; the model has 2"):
        model.graph_diff(layer=2)
    with refused(ValueError, r"there is no pass 'splice'.*its passes are .*splice-press"):
        model.graph_diff(only="splice")
