"""`kvpass bench` on a tiny model: what is measured, and that it is the same work."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from models import eager_model, token_ids
from typer.testing import CliRunner

from kvpass.bench import clock, floor, run, subjects
from kvpass.bench.floor import Hardware, decode_floor, prefill_floor, weight_bytes
from kvpass.bench.memory import peak_memory
from kvpass.cli import app


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    eager_model("llama").save_pretrained(folder)
    return folder


def bench(*arguments: str) -> Any:
    small = ["--press", "knorm", "--context", "80", "--new-tokens", "5", "--repeats", "2", "--backend", "eager"]
    return CliRunner().invoke(app, ["bench", *small, *arguments])


def test_a_table_and_all_numbers(saved: Path, tmp_path: Path) -> None:
    path, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    chosen = [option for name in ("transformers", "kvpass") for option in ("--only", name)]
    chosen += ["--press", "streaming_llm"]  # besides knorm
    result = bench("--model", str(saved), *chosen, "--no-warm", "--json", str(path), "--plot", str(picture))
    assert result.exit_code == 0, result.output
    assert "Medians of 2 runs" in result.output
    told = json.loads(path.read_text())
    rows = {row["name"]: row for row in told["subjects"]}
    whole = ["transformers", "transformers, static, compiled", "kvpass, no press"]
    assert list(rows) == [*whole, "kvpass, knorm", "kvpass, streaming_llm"]
    for row in rows.values():
        assert not row["failure"] and len(row["samples"]) == 2
        assert all(sample["prefill"] > 0 and sample["step"] > 0 for sample in row["samples"])
    pair = 2 * 2 * 2 * 16 * 4  # keys and values, layers, heads, head size, float32
    kept = {name: row["samples"][0]["kept_bytes"] // pair for name, row in rows.items()}
    assert kept["transformers"] == kept["kvpass, no press"] == 84 and kept["kvpass, knorm"] == 44
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_second_process_compiles_again(saved: Path) -> None:
    result = bench("--model", str(saved), "--only", "kvpass, knorm")
    assert result.exit_code == 0, result.output
    assert " / " in result.output


def test_subjects_do_the_same_work() -> None:
    """Where nothing is dropped, all of them say the same."""
    model, ids = eager_model("llama"), token_ids(1, 60)
    table = subjects.subjects(model, ["knorm"], 0.5, "eager", None)
    chosen = subjects.subjects(model, ["knorm", "tova"], 0.5, "eager", None, ("transformers$", "kvpass, (no|tova)"))
    assert list(chosen) == ["transformers", "kvpass, no press", "kvpass, tova"]
    said = {name: clock.run(table[name](), ids, 6).tokens for name in ("transformers", "kvpass, no press")}
    assert said["transformers"] == said["kvpass, no press"]


def test_a_failure_of_others_is_a_result(saved: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(ids: torch.Tensor, **options: Any) -> Any:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(subjects, "_static", lambda model: broken)
    result = bench("--model", str(saved), "--only", "transformers", "--no-warm", "--json", str(tmp_path / "b.json"))
    assert result.exit_code == 0, result.output
    rows = {row["name"]: row for row in json.loads((tmp_path / "b.json").read_text())["subjects"]}
    assert rows["transformers, static, compiled"]["failure"] == "RuntimeError: no kernel"
    monkeypatch.setattr(subjects, "_kvpass", lambda *given: broken)
    assert isinstance(bench("--model", str(saved), "--only", "kvpass", "--no-warm").exception, RuntimeError)


def test_a_machine_that_multiplies_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rate is that of smaller matrices: 1 GFLOP/s would take 17 seconds for one product of the largest."""
    multiplied = []

    def seconds(work: Any, device: torch.device) -> float:
        if not isinstance(work, partial):
            return 1.0  # reading memory
        multiplied.append(len(work.args[0]))
        return float(2 * multiplied[-1] ** 3 / 1e9)

    monkeypatch.setattr(floor, "_seconds", seconds)
    found = floor.measure_hardware(torch.bfloat16, torch.device("cpu"))
    assert found == Hardware(bandwidth=floor.LINE, matrix_rate=pytest.approx(1e9))
    assert max(multiplied) == 512


def test_floors() -> None:
    """Weights that a token needs, plus the cache, over the bandwidth; products of all tokens over the rate."""
    model = eager_model("llama")
    every = sum(p.nbytes for p in model.parameters())
    table = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight.data_ptr() == table.data_ptr()
    assert weight_bytes(model) == (every if tied else every - table.nbytes + table[0].nbytes)
    hardware = Hardware(bandwidth=1e9, matrix_rate=1e9)
    assert decode_floor(model, 1000, hardware) == pytest.approx((weight_bytes(model) + 1000) / 1e9)
    assert prefill_floor(model, 200, hardware) > 2 * prefill_floor(model, 100, hardware)  # attention is quadratic


def test_peak_memory() -> None:
    with peak_memory(torch.device("cpu")) as before:
        pass
    with peak_memory(torch.device("cpu")) as peak:
        torch.ones(2**26).sum()
    if before.bytes is None or peak.bytes is None:
        pytest.skip("this system does not tell the peak of a process")
    assert peak.bytes - before.bytes > 0.9 * 2**28


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --model or --shape"),
        (["--shape", "gpt-5"], "there is no shape 'gpt-5'; shapes are llama-3.2-1b"),
        (["--shape", "qwen3-0.6b", "--press", "snap"], "snapkv"),
    ],
)
def test_bad_options(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert result.exit_code == 1
    assert message in " ".join(result.output.split())


def test_matplotlib_is_asked_for_first(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.show.importlib.util, "find_spec", lambda name: None)
    result = bench("--model", str(saved), "--plot", "bench.png")
    assert result.exit_code == 1 and "pip install 'kvpass[plot]'" in " ".join(result.output.split())
