"""`kvpass inspect`: what is found in a model, or why it is refused."""

import pytest
import torch
from models import captured_model
from typer.testing import CliRunner

from kvpass.cli import app
from kvpass.inspection.architectures import architectures
from kvpass.inspection.findings import findings_of


def inspected(*options: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["inspect", *options], env={"COLUMNS": "140"})
    return result.exit_code, result.output + (result.stderr or "")


def test_a_tiny_model_of_an_architecture() -> None:
    before = torch.random.get_rng_state()
    code, text = inspected("--arch", "glm")
    assert code == 0
    assert "interleaved, 8 of 16 channels" in text and "4 / 2 x 16" in text and "causal" in text
    assert "presses that can run: block, cap," in text
    assert torch.equal(torch.random.get_rng_state(), before)


def test_why_a_model_is_refused() -> None:
    code, text = inspected("--arch", "lfm2")
    assert code == 1 and "layer 0" in text and "a convolution, a recurrent state" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "give a model"),
        (("some/model", "--arch", "glm"), "give a model"),
        (("--arch", "nope"), "there is no decoder architecture 'nope'; known are"),
        (("--arch", "t5gemma"), "there is no decoder architecture"),
    ],
)
def test_what_is_asked_wrongly(options: tuple[str, ...], message: str) -> None:
    code, text = inspected(*options)
    assert code == 1 and message in " ".join(text.split())


def test_kinds_of_layers() -> None:
    found = findings_of(captured_model("gemma3_text").graphs.located)
    assert [layer.mask for layer in found.layers] == ["window 16", "causal"] * 2
    assert [layer.rope for layer in found.layers] == ["rotate-half"] * 4
    assert [layer.pressable for layer in found.layers] == [False, True] * 2
    assert all(why is None for why in found.presses.values())
    assert len({layer.kind for layer in found.layers}) == 2


def test_every_architecture_is_accounted_for() -> None:
    rows, left_out = architectures()
    assert len(rows) > 100 and not set(rows) & set(left_out)
