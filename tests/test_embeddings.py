"""Embeddings instead of token ids: images of a multimodal model, soft prompts."""

from pathlib import Path

import pytest
import torch
from models import compiled_model, eager_model, token_ids
from padding import PAD, close, padded, texts
from torch import Tensor, nn
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Qwen2VLConfig, Qwen2VLForConditionalGeneration

import kvpass
from kvpass.errors import CacheError, InputError, PressError, UnsupportedModelError
from kvpass.pass_manager import PassManager
from kvpass.passes.accept_embeddings import AcceptEmbeddings
from kvpass.testing import assert_pass_diff

GREEDY = {"do_sample": False, "pad_token_id": PAD, "eos_token_id": None}


def embed(arch: str, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = eager_model(arch).get_input_embeddings()(ids)
    return found


@pytest.mark.parametrize("arch", ["llama", "gemma3_text"])  # Gemma's embedding module scales what it looks up
def test_the_embeddings_of_ids_are_the_ids(arch: str) -> None:
    """The same prompt as ids and as embeddings: cache, logits, question, one more token, and what is generated."""
    model = compiled_model(arch, "snapkv(window_size=8)", ratio=0.5)
    ids, question = token_ids(2, 61), token_ids(2, 5, seed=3)
    expected, found = model.prefill(ids), model.prefill(inputs_embeds=embed(arch, ids))
    close(found.logits, expected.logits)
    for layer in range(len(expected.past_key_values)):
        assert torch.equal(found.past_key_values.positions(layer), expected.past_key_values.positions(layer))
        close(found.past_key_values.keys(layer), expected.past_key_values.keys(layer))
    for more in (question, question[:, :1]):
        logits = [
            model(input_ids=more, past_key_values=expected.past_key_values).logits,
            model(inputs_embeds=embed(arch, more), past_key_values=found.past_key_values).logits,
        ]
        close(logits[1], logits[0])
    for options in ({}, {"num_beams": 3}):
        text = model.generate(ids, max_new_tokens=8, **GREEDY, **options)
        new = model.generate(inputs_embeds=embed(arch, ids), max_new_tokens=8, **GREEDY, **options)
        assert new.tolist() == text[:, 61:].tolist()


def test_rows_of_different_length() -> None:
    model = compiled_model("llama", "knorm", ratio=0.5)
    ids, mask = padded(texts((50, 33)), "left")
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=6, **GREEDY)[:, 50:]
    found = model.generate(inputs_embeds=embed("llama", ids), attention_mask=mask, max_new_tokens=6, **GREEDY)
    assert found.tolist() == expected.tolist()


def test_the_graph_reads_embeddings_instead_of_ids() -> None:
    """Only where they are given: a model that never sees any has no such graph."""
    model = compiled_model("llama", "knorm", ratio=0.5)
    execution = model._execution
    model.prefill(token_ids(1, 40))
    model.prefill(inputs_embeds=torch.randn(1, 40, 64))
    ports = {key[2]: [p.name for p in g.program.inputs] for key, g in execution.ready.items() if key[1] is not None}
    assert "inputs_embeds" not in ports[False] and "input_ids" in ports[False]
    assert "input_ids" not in ports[True] and "inputs_embeds" in ports[True]


def test_the_pass() -> None:
    before = compiled_model("llama", "knorm", ratio=0.5).graph("prefill")
    assert_pass_diff(
        before,
        AcceptEmbeddings(),
        """\

-input input_ids: i64[B, S]
+input inputs_embeds: f32[B, S, 64]
-embedding: f32[B, S, 64] = embedding(model.embed_tokens.weight, input_ids, 0)
""",
        layer=None,
    )
    assert AcceptEmbeddings().run(PassManager((AcceptEmbeddings(),)).run(before)) == 0


# -- a vision-language model ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vision_language() -> Qwen2VLForConditionalGeneration:
    torch.manual_seed(0)
    config = Qwen2VLConfig(
        text_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 128,
            "max_position_embeddings": 512,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 100.0},
        },
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2},
        image_token_id=5,
        video_token_id=6,
        vision_start_token_id=7,
        vision_end_token_id=8,
    )
    model = Qwen2VLForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3) if parameter.dim() > 1 else nn.init.normal_(parameter, mean=1.0, std=0.3)
    return model


def prompt_with_image(model: Qwen2VLForConditionalGeneration) -> tuple[Tensor, Tensor]:
    """Embeddings [1, S, D_model] and positions i64[3, 1, S]: 6 words, a picture of 4 x 6 patches, 21 words."""
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(10, 120, (1, 27), generator=generator)
    picture = torch.randn(1, 24, 32, generator=generator)
    with torch.no_grad():
        embedded = model.get_input_embeddings()(words)
    rows, columns = torch.arange(4).repeat_interleave(6), torch.arange(6).repeat(4)
    positions = torch.cat(
        [
            torch.arange(6).expand(3, -1),
            6 + torch.stack([torch.zeros(24, dtype=torch.int64), rows, columns]),
            12 + torch.arange(21).expand(3, -1),
        ],
        dim=1,
    )
    return torch.cat([embedded[:, :6], picture, embedded[:, 6:]], dim=1), positions[:, None]


def eager(model: Qwen2VLForConditionalGeneration, embeds: Tensor, positions: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(inputs_embeds=embeds, position_ids=positions, use_cache=False).logits
    return logits


def test_a_picture_is_read_as_eager_reads_it(vision_language: Qwen2VLForConditionalGeneration) -> None:
    """Nothing dropped: logits behind the prompt, of a question, and token by token, at positions on three axes."""
    model = kvpass.compile(vision_language, backend="eager")
    embeds, positions = prompt_with_image(vision_language)
    question = token_ids(1, 5) % 100 + 10
    with torch.no_grad():
        behind = vision_language.get_input_embeddings()(question)
    after = (33 + torch.arange(5)).expand(3, 1, 5)  # the greatest position of the prompt is 32
    expected = eager(vision_language, torch.cat([embeds, behind], 1), torch.cat([positions, after], 2))
    prompt = model.prefill(inputs_embeds=embeds, positions=positions)
    cache = prompt.past_key_values
    close(prompt.logits, expected[:, 50:51])
    assert (cache.seen_tokens, cache.next_positions) == (51, (33,))
    close(model(input_ids=question, past_key_values=cache).logits, expected[:, 51:])
    cache.rewind()
    assert cache.next_positions == (33,)
    for step in range(5):
        logits = model(input_ids=question[:, step : step + 1], past_key_values=cache).logits
        close(logits, expected[:, 51 + step : 52 + step])
    wrong = model.prefill(inputs_embeds=embeds).logits  # without its positions the picture is another one
    assert (wrong - expected[:, 50:51]).abs().max() > 1e-2


def test_a_second_picture_behind_the_first(vision_language: Qwen2VLForConditionalGeneration) -> None:
    """Appended to a cache, saved, loaded; what was read with positions of its own cannot be cut in the middle."""
    model = kvpass.compile(vision_language, backend="eager")
    embeds, positions = prompt_with_image(vision_language)
    expected = eager(vision_language, embeds.repeat(1, 2, 1), torch.cat([positions, positions + 33], 2))
    cache = model.prefill(inputs_embeds=embeds, positions=positions).past_key_values
    found = model(inputs_embeds=embeds, positions=positions + 33, past_key_values=cache).logits
    close(found, expected[:, 51:])
    assert cache.next_positions == (66,)
    with pytest.raises(CacheError, match="rows are padded or embedded there"):
        cache.crop(80)
    cache.crop(51)
    assert cache.next_positions == (33,)


def test_a_pressed_picture(vision_language: Qwen2VLForConditionalGeneration, tmp_path: Path) -> None:
    """The kept set is that of the scores, whatever the tokens are; generate goes on as forward does."""
    model = kvpass.compile(vision_language, press="snapkv(window_size=8)", ratio=0.5, backend="eager")
    embeds, positions = prompt_with_image(vision_language)
    cache = model.prefill(inputs_embeds=embeds, positions=positions).past_key_values
    plain = kvpass.compile(vision_language, backend="eager").prefill(inputs_embeds=embeds, positions=positions)
    for layer in range(2):
        places = cache.positions(layer)[..., None].expand(-1, -1, -1, 8)
        assert cache.kept(layer) == 25
        close(cache.keys(layer), plain.past_key_values.keys(layer).gather(2, places))
    cache.save(tmp_path / "cache.safetensors")
    loaded = kvpass.CompressedCache.load(tmp_path / "cache.safetensors")
    assert loaded.next_positions == (33,)
    tokens = model.generate(inputs_embeds=embeds, positions=positions, max_new_tokens=6, **GREEDY)[0].tolist()
    logits = model.prefill(inputs_embeds=embeds, positions=positions).logits
    for token in tokens:
        assert int(logits[0, -1].argmax()) == token
        logits = model(input_ids=torch.tensor([[token]]), past_key_values=loaded).logits
    two = model.generate(
        inputs_embeds=embeds.repeat(2, 1, 1), positions=positions.repeat(1, 2, 1), max_new_tokens=6, **GREEDY
    )
    assert two.tolist() == [tokens, tokens]


def test_gemma_3_with_its_vision_tower() -> None:
    """Windows, and embeddings behind the scale; without token_type_ids eager attends causally too."""
    text = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 128,
        "sliding_window": 16,
        "max_position_embeddings": 512,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14})
    torch.manual_seed(0)
    original = Gemma3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        embeds = original.get_input_embeddings()(token_ids(2, 45) % 128)
        embeds[:, 5:25] = torch.randn(2, 20, 32)
        expected = original(inputs_embeds=embeds, use_cache=False).logits
    model = kvpass.compile(original, press="knorm", ratio=0.0, backend="eager")
    prompt = model.prefill(inputs_embeds=embeds[:, :40])
    close(prompt.logits, expected[:, 39:40])
    close(model(inputs_embeds=embeds[:, 40:], past_key_values=prompt.past_key_values).logits, expected[:, 40:])
    pressed = kvpass.compile(original, press="knorm", ratio=0.5, backend="eager").prefill(inputs_embeds=embeds)
    assert [pressed.past_key_values.kept(layer) for layer in range(2)] == [16, 22]


def test_what_is_refused(vision_language: Qwen2VLForConditionalGeneration) -> None:
    embeds, positions = prompt_with_image(vision_language)
    moving = kvpass.compile(vision_language, press="key_rerotation(knorm)", ratio=0.5, backend="eager")
    with pytest.raises(PressError, match="key_rerotation moves keys to stand side by side, which is not where"):
        moving.prefill(inputs_embeds=embeds, positions=positions)
    model = kvpass.compile(vision_language, backend="eager")
    with pytest.raises(InputError, match="positions have 2 axes, this model takes 3 axes"):
        model.prefill(inputs_embeds=embeds, positions=positions[:2])
    with pytest.raises(InputError, match="positions= come with inputs_embeds; those of input_ids are counted"):
        model.prefill(token_ids(1, 9) % 128, positions=positions)
    with pytest.raises(InputError, match=r"positions must be whole numbers \[batch, tokens\] or"):
        model.prefill(inputs_embeds=embeds, positions=positions[:, :, 1:])
    with pytest.raises(InputError, match="both input_ids and inputs_embeds were given"):
        model(input_ids=token_ids(1, 9) % 100 + 10, inputs_embeds=embeds)
    with pytest.raises(InputError, match=r"inputs_embeds must be torch.float32 \[batch, tokens, width\] with at least"):
        model.prefill(inputs_embeds=embeds[0])
    with pytest.raises(InputError, match="inputs_embeds are 31 wide, the model's embeddings 32"):
        model.prefill(inputs_embeds=embeds[..., :31])
    with pytest.raises(InputError, match="the text is 601 tokens long, the model's positions end at 512"):
        model.prefill(inputs_embeds=embeds, positions=positions + 568)
    with pytest.raises(InputError, match="token_type_ids mark tokens that attend to one another in both directions"):
        model.prefill(token_ids(1, 9) % 100 + 10, token_type_ids=torch.ones(1, 9, dtype=torch.int64))


class ReadsIdsTwice(nn.Module):
    """A second table beside the embeddings, as Gemma 3n has one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.other = nn.Embedding(64, 16), nn.Embedding(64, 16)
        self.head = nn.Linear(16, 64)

    def forward(self, input_ids: Tensor) -> Tensor:
        states = self.embed(input_ids)
        heads = states[:, None]
        out = nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)[:, 0]
        return self.head(out + self.other(input_ids))


def test_ids_that_are_read_elsewhere() -> None:
    model = kvpass.compile(ReadsIdsTwice(), max_tokens=128, backend="eager")
    with pytest.raises(UnsupportedModelError, match=r"in other places than one table .*embedding, embedding_1"):
        model.prefill(inputs_embeds=torch.randn(1, 9, 16))
