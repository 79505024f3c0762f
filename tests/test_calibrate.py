"""Statistics of queries: against forward hooks on the eager model, through files into presses, on real text."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import captured_model, eager_model, token_ids
from safetensors import safe_open
from tiny_models import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from typer.testing import CliRunner

import kvpass
from kvpass import smollm2
from kvpass.calibrate import METHODS, calibrate, save
from kvpass.cli import app
from kvpass.demo.context import encode, long_text
from kvpass.errors import InputError, MissingTapError, PressError, UnsupportedModelError
from kvpass.presses import ExpectedAttentionStats, QFilter


def queries_of(model: PreTrainedModel, ids: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Queries before and after RoPE by layer, [1, H, S, D]: hooks on the eager model, RoPE as transformers has it."""
    found: list[Tensor] = []
    hooks = []
    for layer in model.model.layers:
        attention = layer.self_attn
        source = getattr(attention, "q_norm", attention.q_proj)
        hooks.append(source.register_forward_hook(lambda module, given, result: found.append(result)))
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    before = [q.reshape(*ids.shape, -1, 16).transpose(1, 2) for q in found]
    cos, sin = model.model.rotary_emb(before[0], torch.arange(ids.shape[1])[None])
    return before, [apply_rotary_pos_emb(q, q, cos, sin)[0] for q in before]


SAMPLES = [token_ids(1, 40, seed=1), token_ids(1, 57, seed=2)]


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_statistics_are_those_of_the_eager_model(arch: str) -> None:
    """Mean and unbiased covariance of all samples without their first 4 tokens, behind q_norm."""
    before = [queries_of(eager_model(arch), ids)[0] for ids in SAMPLES]
    learned = calibrate(captured_model(arch), "expected_attention_stats", [ids[0] for ids in SAMPLES])
    assert {name: tensor.dtype for name, tensor in learned.items()} == dict.fromkeys(learned, torch.float32)
    for layer in range(2):
        vectors = torch.cat([sample[layer][0, :, 4:] for sample in before], dim=1).double()  # [H, N, D]
        torch.testing.assert_close(learned["query_mean"][layer].double(), vectors.mean(dim=1), atol=1e-5, rtol=1e-5)
        covariance = torch.stack([torch.cov(head.T) for head in vectors])
        torch.testing.assert_close(learned["query_cov"][layer].double(), covariance, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_filters_are_the_singular_vectors_of_the_eager_model(arch: str) -> None:
    """The SVD of all queries of a head, as the paper has it: mean projection positive, mean of the group, negated."""
    after = [queries_of(eager_model(arch), ids)[1] for ids in SAMPLES]
    learned = calibrate(captured_model(arch), "qfilter", SAMPLES)["q_filters"]
    for layer in range(2):
        vectors = torch.cat([sample[layer][0] for sample in after], dim=1).double()  # [H, N, D]
        main = torch.linalg.svd(vectors, full_matrices=False).Vh[:, 0]  # [H, D]
        projection = (vectors * main[:, None]).sum(dim=-1).mean(dim=1)
        expected = -(main * projection.sign()[:, None]).unflatten(0, (2, 2)).mean(dim=1)
        torch.testing.assert_close(learned[layer].double(), expected, atol=1e-4, rtol=1e-4)


def test_a_batch_is_as_many_samples() -> None:
    batch = token_ids(3, 30)
    one, other = (calibrate(captured_model("llama"), "qfilter", ids)["q_filters"] for ids in ([batch], list(batch)))
    torch.testing.assert_close(one, other)


def test_the_file_of_every_architecture_fits_its_press(arch: str, tmp_path: Path) -> None:
    """Also where layers have sliding windows, whose statistics nobody reads."""
    samples = [token_ids(1, 50)]
    for method in METHODS:
        save(calibrate(captured_model(arch), method, samples), tmp_path / f"{method}.safetensors")
    save(calibrate(captured_model(arch), "qfilter", samples), tmp_path / "folder")
    for press in (
        QFilter(filters=str(tmp_path / "qfilter.safetensors")),
        QFilter(filters=str(tmp_path / "folder")),
        ExpectedAttentionStats(stats_folder=str(tmp_path / "expected_attention_stats.safetensors")),
    ):
        model = kvpass.compile(captured_model(arch), press=press, ratio=0.5, backend="eager")
        cache = model.prefill(token_ids(1, 90)).past_key_values
        assert {cache.kept(i) for i in range(len(cache)) if cache.layout.layers[i].pressed} == {45}


def test_the_press_keeps_what_queries_look_for(tmp_path: Path) -> None:
    """By construction: without RoPE, and with queries that are little but a direction, logits rank keys exactly."""
    model = tiny_model("qwen2", seed=3)
    model.model.rotary_emb.inv_freq.zero_()
    generator = torch.Generator().manual_seed(0)
    wanted = torch.randn(2, 2, 16, generator=generator)  # by layer and KV head
    for layer, direction in zip(model.model.layers, wanted, strict=True):
        layer.self_attn.q_proj.weight.mul_(0.01)
        layer.self_attn.q_proj.bias.copy_(direction.repeat_interleave(2, dim=0).flatten())
    captured = kvpass.capture_model(model)
    learned = calibrate(captured, "qfilter", [token_ids(1, 60)])["q_filters"]
    cosine = torch.nn.functional.cosine_similarity(learned, wanted, dim=-1)
    assert (cosine < -0.99).all(), "the file holds the opposite direction, as those of the authors"
    model.set_attn_implementation("eager")
    prompt = token_ids(1, 80, seed=5)
    with torch.no_grad():
        attentions = model(prompt, output_attentions=True).attentions
    received = {}
    for sign in (1, -1):
        source = str(save({"q_filters": learned * sign}, tmp_path / f"{sign}.safetensors"))
        compiled = kvpass.compile(captured, press=QFilter(filters=source), ratio=0.5, backend="eager")
        received[sign] = attention_on_kept(compiled.prefill(prompt).past_key_values, attentions, 80)
    assert (received[1] > 0.55).all() and (received[-1] < 0.45).all()
    torch.testing.assert_close(received[1] + received[-1], torch.ones(2, 2), msg="one keeps what the other drops")


def attention_on_kept(cache: Any, attentions: tuple[Tensor, ...], tokens: int, sinks: int = 0) -> Tensor:
    """The share of the last query's attention on tokens `sinks` to `tokens` that the kept pairs got, [L, Hkv]."""
    shares = []
    for layer, weights in enumerate(attentions):
        kept = cache.positions(layer)[0]  # [Hkv, N]
        paid = weights[0, :, -1, :tokens].unflatten(0, (kept.shape[0], -1)).mean(dim=1)  # [Hkv, tokens]
        paid[:, :sinks] = 0
        shares.append(paid.gather(1, kept).sum(dim=1) / paid.sum(dim=1))
    return torch.stack(shares)


def test_progress_counts_layers_of_samples() -> None:
    seen: list[tuple[int, int]] = []
    calibrate(captured_model("llama"), "qfilter", SAMPLES, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_first_tokens_are_left_out() -> None:
    """A sample counts by what is behind them, and the same tokens behind others are no other queries in layer 0."""
    model, ids = captured_model("llama"), token_ids(1, 40)
    other = torch.cat([token_ids(1, 7, seed=9), ids[:, 7:]], dim=1)
    one, two = (calibrate(model, "expected_attention_stats", [x], n_sink=7)["query_mean"] for x in (ids, other))
    torch.testing.assert_close(one[0], two[0])
    assert not torch.allclose(one[1], two[1])


@pytest.mark.parametrize(
    ("method", "samples", "error", "message"),
    [
        ("snapkv", SAMPLES, PressError, "no method 'snapkv'; known are expected_attention_stats, qfilter"),
        ("qfilter", [], InputError, "0 samples with 0 tokens"),
        ("expected_attention_stats", [token_ids(1, 4)], InputError, r"sample 0 has 4 tokens, expected 5 .*to 4096"),
        ("expected_attention_stats", [token_ids(1, 5)], InputError, "1 tokens behind the first 4 .* at least 2"),
        ("qfilter", [token_ids(1, 5000)], InputError, r"5000 tokens, expected 1 .* to 4096 \(the longest text"),
        ("qfilter", [torch.rand(1, 9)], InputError, r"torch.float32\[1, 9\], expected token ids"),
        ("qfilter", [torch.zeros(1, 2, 3).long()], InputError, r"\[1, 2, 3\], expected token ids \[S\] or \[B, S\]"),
    ],
)
def test_errors(method: str, samples: list[Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        calibrate(captured_model("llama"), method, samples)


def test_a_model_without_such_queries_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvpass.ir.taps import Taps

    def refuse(self: Taps, site: Any, name: str) -> Any:
        raise MissingTapError(f"layer {site.layer}: no state before RoPE found")

    monkeypatch.setattr(Taps, "node", refuse)
    with pytest.raises(MissingTapError, match="layer 0: no state before RoPE"):
        calibrate(captured_model("llama"), "expected_attention_stats", SAMPLES)
    with pytest.raises(UnsupportedModelError, match="the model is a str"):
        calibrate("smollm2", "qfilter", SAMPLES)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint with a tokenizer of 256 words, w0 to w255."""
    path = tmp_path_factory.mktemp("tiny-llama")
    eager_model("llama").save_pretrained(path)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(256)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w3").save_pretrained(path)
    return path


@pytest.fixture
def invoke(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`kvpass calibrate` on the tiny checkpoint and a text of 60 words, but for what is given."""
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "text.txt").write_text(" ".join(f"w{i}" for i in SAMPLES[1][0].tolist()))
    usual = {"--method": "qfilter", "--model": str(folder), "--text": str(tmp_path / "text.txt")}
    usual["--out"] = str(tmp_path / "new" / "out.safetensors")
    return lambda **given: CliRunner().invoke(
        app,
        [
            "calibrate",
            *(
                part
                for pair in (usual | {f"--{k.replace('_', '-')}": v for k, v in given.items()}).items()
                for part in pair
            ),
        ],
    )


def test_command_writes_the_file_of_the_press(invoke: Callable[..., Any], folder: Path, tmp_path: Path) -> None:
    result = invoke(method="expected_attention_stats")
    assert result.exit_code == 0, result.output
    out = tmp_path / "new" / "out.safetensors"
    assert f'Use: kvpass.presses.ExpectedAttentionStats(stats_folder="{out}")' in result.stdout
    ids = AutoTokenizer.from_pretrained(folder)((tmp_path / "text.txt").read_text(), return_tensors="pt")["input_ids"]
    read = f"Read {ids.shape[1]} tokens of 1 text: query_mean [2, 4, 16], query_cov [2, 4, 16, 16]\n"
    assert read in result.stdout
    with safe_open(out, "pt") as file:
        assert file.metadata()["method"] == "expected_attention_stats"
        assert (file.metadata()["tokens"], file.metadata()["n_sink"]) == (str(ids.shape[1]), "4")
        mean = file.get_tensor("query_mean")
    expected = calibrate(captured_model("llama"), "expected_attention_stats", [ids])["query_mean"]
    torch.testing.assert_close(mean, expected)
    assert [path.name for path in out.parent.iterdir()] == ["out.safetensors"]
    ExpectedAttentionStats(stats_folder=str(out))


def test_command_says_how_to_use_another_n_sink(invoke: Callable[..., Any], tmp_path: Path) -> None:
    out = str(tmp_path / "out.safetensors")
    result = invoke(method="expected_attention_stats", n_sink="2", out=out)
    assert f'Use: kvpass.presses.ExpectedAttentionStats(stats_folder="{out}", n_sink=2)' in result.stdout


def test_command_cuts_texts(invoke: Callable[..., Any], tmp_path: Path) -> None:
    assert (
        "Read 20 tokens of 1 text: q_filters [2, 2, 16]" in invoke(max_tokens="20", out=str(tmp_path / "folder")).stdout
    )
    assert (tmp_path / "folder" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"method": "kvzap"},
            "Error: calibrate: there is no method 'kvzap'; known are expected_attention_stats, qfilter",
        ),
        ({"text": "no-such-file"}, "Error: no text to read from 'no-such-file' ("),
        ({"text": "{empty}"}, "is empty; calibration needs some hundred tokens"),
        (
            {"max_tokens": "3", "method": "expected_attention_stats"},
            "Error: calibrate: sample 0 has 3 tokens, expected 5",
        ),
        ({"model": "./no-such-folder"}, "Error: no model and tokenizer to load from './no-such-folder' ("),
        ({"out": "out.pt"}, "Error: 'out.pt' is neither a .safetensors file nor a folder"),
        ({"out": "{empty}/out.safetensors"}, "Error: cannot write '"),
    ],
)
def test_command_errors_are_one_line(
    invoke: Callable[..., Any], tmp_path: Path, given: dict[str, str], message: str
) -> None:
    (tmp_path / "empty").write_text(" \n")
    result = invoke(**{name: value.replace("{empty}", str(tmp_path / "empty")) for name, value in given.items()})
    assert result.exit_code == 1, result.output
    error = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(error) == 1 and message in error[0]
    assert "Traceback" not in result.output


def test_real_model(tmp_path: Path) -> None:
    """Layers of SmolLM2 and prose: filters from one part of it keep what a later token of another part attends to."""
    try:
        model, tokenizer = smollm2.load()
    except smollm2.MissingModelError as error:
        pytest.skip(str(error))
    model.model.layers = model.model.layers[:10]  # the others take a minute on a small machine and show the same
    model.config.num_hidden_layers = 10
    ids = encode(tokenizer, long_text())
    captured = kvpass.capture_model(model)
    learned = calibrate(captured, "qfilter", [ids[:, 4000:4256]])["q_filters"]
    assert learned.shape == (10, 3, 64)
    prompt = ids[:, :192]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(ids[:, :208], output_attentions=True).attentions  # 16 tokens after the prompt
    received = {}
    for sign in (-1, 1):
        source = str(save({"q_filters": learned * sign}, tmp_path / f"{sign}.safetensors"))
        compiled = kvpass.compile(captured, press=QFilter(filters=source), ratio=0.5, backend="eager")
        received[sign] = attention_on_kept(compiled.prefill(prompt).past_key_values, attentions, 192, sinks=4)
    assert received[1].mean() > 0.8 > 0.2 > received[-1].mean()
    assert (received[1] > received[-1]).float().mean() > 0.9
    output = compiled.generate(prompt, max_new_tokens=4, do_sample=False)
    assert output.shape == (1, 196)
