"""The README's tables are those of the registry, its names exist, its commands are the ones CI runs."""

import dataclasses
import re
from pathlib import Path

from models import captured_model, token_ids

import kvpass
from kvpass.ir.form import Phase
from kvpass.pipeline import capture_passes, phase_passes
from kvpass.presses import Knorm
from kvpass.testing import check_press

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def section(name: str) -> list[list[str]]:
    """The cells of a table between its markers, without the head."""
    text = README.split(f"<!-- {name} -->")[1].split("<!-- end -->")[0]
    rows = [line for line in text.strip().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def test_table_of_presses() -> None:
    """Names, papers and fields with their defaults."""
    ours = {name: cls for name, cls in kvpass.registered_presses().items() if cls.__module__.startswith("kvpass.")}
    rows = {row[0].strip("`"): row for row in section("presses")}
    assert list(rows) == sorted(ours)
    for name, cls in ours.items():
        fields = ", ".join(f"{field.name}={field.default}" for field in dataclasses.fields(cls))
        assert rows[name][3].strip("`") == fields
        documented = re.findall(r"arxiv.org/abs/([\d.]+)", __import__(cls.__module__, fromlist=["x"]).__doc__ or "")
        assert re.findall(r"abs/([\d.]+)\)", rows[name][2]) == [paper.rstrip(".") for paper in documented]


def test_table_of_passes() -> None:
    """Names, forms and phases, in the order of the pipeline."""
    capture = list(capture_passes())
    phases = {phase: list(phase_passes(phase, Knorm())) for phase in Phase}
    expected = [[f"`{p.name}`", p.requires.name, p.produces.name, "capture"] for p in capture]
    for step in phases[Phase.PREFILL]:
        everywhere = all(step.name in [p.name for p in steps] for steps in phases.values())
        expected.append([f"`{step.name}`", step.requires.name, step.produces.name, "all" if everywhere else "prefill"])
    assert [row[:4] for row in section("passes")] == expected


def test_public_names_that_the_readme_uses_exist() -> None:
    used = set(re.findall(r"kvpass\.([A-Za-z_]+)\b", README)) - {"presses", "testing"}
    assert used <= set(kvpass.__all__)


def test_the_press_of_the_readme_works() -> None:
    """The snippet is run as it stands, on a tiny model; its window is kept."""
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "class Recent" in block]
    scope = {"model": captured_model("llama")}
    exec(code.replace("ratio=0.5)", 'ratio=0.5, backend="eager")'), scope)
    cache = scope["model"].prefill(token_ids(1, 150)).past_key_values
    assert cache.positions(0)[0, 0, -64:].tolist() == list(range(86, 150))
    check_press(scope["Recent"](), captured_model("llama"))


def test_ci_runs_the_readme_command() -> None:
    assert "<!-- test command -->" in (ROOT / ".ci" / "run").read_text()
    assert README.count("<!-- test command -->") == 1


def test_passes_is_one_folder_with_two_names() -> None:
    link = ROOT / "kvpass" / "passes"
    assert link.is_symlink()
    assert link.resolve() == ROOT / "passes"
