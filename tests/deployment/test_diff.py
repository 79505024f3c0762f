"""What two exported models differ in."""

from pathlib import Path

import pytest
import torch
from expecttest import assert_expected_inline
from models import compiled_model
from torch import nn
from typer.testing import CliRunner

from kvpass.cli import app
from kvpass.deployment.export import read_texts
from kvpass.errors import PackageError
from kvpass.testing import assert_exported_diff


class Small(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4, bias=False)
        self.factor = factor

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": (self.linear(x) * self.factor + x).relu()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("diff")
    for name, ratio in (("half", 0.5), ("quarter", 0.25)):
        compiled_model("llama", "knorm", ratio=ratio).export(folder / name, max_tokens=300)
    for name, factor in (("small", 2.0), ("smaller", 3.0)):
        size = {0: torch.export.Dim.DYNAMIC}
        program = torch.export.export(Small(factor), (torch.ones(3, 4),), dynamic_shapes=(size,), strict=False)
        torch.export.save(program, folder / f"{name}.pt2")
    return folder


def test_two_ratios(folder: Path) -> None:
    """Only prefill differs; decode does not know the ratio."""
    old, new = (read_texts(folder / name) for name in ("half", "quarter"))
    assert [name for name in old if old[name] != new[name]] == ["prefill"]
    assert "topk(neg, S//2)" in old["prefill"]
    assert "topk(neg, (3*S)//4)" in new["prefill"]


def test_programs_of_torch(folder: Path) -> None:
    assert_exported_diff(
        folder / "small.pt2",
        folder / "smaller.pt2",
        """\

program:
...
 f32[x_0, 4] linear(x, linear.weight)
-f32[x_0, 4] mul(linear, 2)
+f32[x_0, 4] mul(linear, 3)
 f32[x_0, 4] add(mul, x)
""",
    )


def test_a_program_as_text(folder: Path) -> None:
    assert_expected_inline(
        read_texts(folder / "small.pt2")["program"],
        """\
weight linear.weight: f32[4, 4]
input x: f32[x_0, 4]
f32[x_0, 4] linear(x, linear.weight)
f32[x_0, 4] mul(linear, 2)
f32[x_0, 4] add(mul, x)
f32[x_0, 4] relu(add)
returns y: relu
""",
    )


def test_the_command(folder: Path) -> None:
    def run(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["diff", *arguments])
        return result.exit_code, result.output

    half, quarter = str(folder / "half"), str(folder / "quarter")
    assert run(half, half) == (0, "")
    code, text = run(half, quarter)
    assert code == 1
    assert text.startswith("prefill:\n")
    assert run(half, quarter, "--only", "decode") == (0, "")
    assert run(half, quarter, "--only", "nothing")[0] == 1


def test_what_is_no_program(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.pt2").write_text("nothing")
    for path in (tmp_path, tmp_path / "text.pt2"):
        with pytest.raises(PackageError, match="package"):
            read_texts(path)
    with pytest.raises(PackageError, match="does not exist"):
        read_texts(tmp_path / "none")
