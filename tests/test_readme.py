"""The README's tables are those of the registry, its names exist, its commands are the ones CI runs."""

import json
import os
import re
from pathlib import Path

from models import captured_model, token_ids
from safetensors import safe_open

import kvpass
from kvpass.deployment.export import FORMATS
from kvpass.ir.form import Phase
from kvpass.passes.lower_for_tensorrt import LowerForTensorRT
from kvpass.pipeline import capture_passes, phase_passes
from kvpass.press_facts import facts_of, fields_of
from kvpass.presses import Knorm
from kvpass.quality.subjects import subjects
from kvpass.testing import check_press

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def section(name: str) -> list[list[str]]:
    """The cells of a table between its markers, without the head."""
    text = README.split(f"<!-- {name} -->")[1].split("<!-- end -->")[0]
    rows = [line for line in text.strip().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def table_of_presses() -> str:
    """What the README must say of the registry."""
    lines = ["| name | what it does | paper | reads | changes | options |", "|---|---|---|---|---|---|"]
    for name, cls in kvpass.registered_presses().items():
        if not cls.__module__.startswith("kvpass."):
            continue
        facts = facts_of(cls)
        papers = ", ".join(f"[{url.split('/abs/')[-1].split('doi.org/')[-1]}]({url})" for url in facts.papers)
        options = ", ".join(n if default == "required" else f"{n}={default}" for n, _, default in fields_of(cls))
        cells = [f"`{name}`", facts.sentence, papers, facts.needs_text, facts.changes, options and f"`{options}`"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def test_table_of_presses() -> None:
    """Generated from the registry; EXPECTTEST_ACCEPT=1 rewrites it."""
    start = README.index("<!-- presses -->\n") + len("<!-- presses -->\n")
    end = README.index("<!-- end -->", start)
    if os.environ.get("EXPECTTEST_ACCEPT"):
        (ROOT / "README.md").write_text(f"{README[:start]}{table_of_presses()}\n{README[end:]}")
    else:
        assert README[start:end].strip() == table_of_presses()


def test_table_of_divergences_has_every_press() -> None:
    """As `kvpass quality` measures them."""
    rows = {row[0].strip("`") for row in section("quality")}
    assert rows == set(subjects(Path()))


def test_every_press_has_parity_and_snapshots() -> None:
    """A press that is not compared with the reference, or whose graph nobody looks at, is not finished."""
    ours = {name for name, cls in kvpass.registered_presses().items() if cls.__module__.startswith("kvpass.")}
    folder = ROOT / "tests" / "parity" / "fixtures"
    compared = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            compared |= {case["press"].split("(")[0] for case in json.loads(file.metadata()["parity"])["cases"]}
    assert compared == ours
    assert {path.stem for path in (ROOT / "tests" / "presses" / "snapshots").glob("*.txt")} == ours


def test_counts_of_the_sweep() -> None:
    """Those in the table's head, which are those of its rows."""
    table = (ROOT / "tests" / "sweep" / "table.md").read_text()
    (counts,) = re.findall(r"^(\d+ architectures: .*?); \d+ model types left out\.$", table, re.M)
    assert counts in " ".join(README.split())
    rows = [line for line in table.splitlines() if re.match(r"\| (?!architecture)\S+ \| \w", line)]
    refused = [row for row in rows if row.split(" | ")[4].startswith("refused")]
    partly = [row for row in rows if "refused" in row and row not in refused]
    found = (len(rows), len(rows) - len(refused) - len(partly), len(partly), len(refused), 0)
    assert tuple(map(int, re.findall(r"\d+", counts))) == found
    assert "failed:" not in table


def test_table_of_passes() -> None:
    """Names, forms and phases, in the order of the pipeline."""
    capture = list(capture_passes())
    phases = {
        phase: list(phase_passes(phase, Knorm(), embeddings=True, one_row=phase is Phase.DECODE)) for phase in Phase
    }
    expected = [[f"`{p.name}`", p.requires.name, p.produces.name, "capture"] for p in capture]
    exported = [step for step in phase_passes(Phase.PREFILL, Knorm(), functional=True) if step.name == "return-cache"]
    at = [step.name for step in phases[Phase.PREFILL]].index("write-cache-in-place") + 1
    for steps in phases.values():
        steps += exported
    tensorrt = LowerForTensorRT(2)
    for steps in phases.values():
        steps.append(tensorrt)
    prefill, decode = phases[Phase.PREFILL], phases[Phase.DECODE]
    for step in (*prefill[:at], *exported, *prefill[at:-2], *decode[-4:-2], tensorrt):
        where = [phase.value for phase, steps in phases.items() if step.name in [p.name for p in steps]]
        name = "all" if len(where) == len(phases) else where[0]
        expected.append([f"`{step.name}`", step.requires.name, step.produces.name, name])
    assert [row[:4] for row in section("passes")] == expected


def test_table_of_formats() -> None:
    assert [row[0] for row in section("formats")] == [f"`{name}`" for name in FORMATS]


def test_public_names_that_the_readme_uses_exist() -> None:
    used = set(re.findall(r"kvpass\.([A-Za-z_]+)\b", README)) - {"presses", "testing", "hpp"}
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
