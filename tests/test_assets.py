"""Learned tensors from files, folders and the hub; every failure is one PressError with the cure."""

import os
import pickle
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from models import captured_model, token_ids
from safetensors.torch import save_file
from torch import Tensor

import kvpass
from kvpass.assets import expect_shape, load_tensors, short_name
from kvpass.errors import PressError
from kvpass.press import ModelFacts, Press
from kvpass.presses import ExpectedAttentionStats, KVzap, QFilter
from kvpass.testing import check_press

FACTS = ModelFacts(name="someone/Meta-Llama-x", layers=2, heads=4, kv_heads=2, key_size=16, hidden_size=64)


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def kvzap_tensors(model_type: str, layers: int = 2, hidden: int = 8) -> dict[str, Tensor]:
    """As the authors' files call them."""
    parts = {"0.": (hidden, 64), "2.": (2, hidden)} if model_type == "mlp" else {"": (2, 64)}
    found = {}
    for layer in range(layers):
        for part, shape in parts.items():
            found[f"layers.{layer}.{part}weight"] = drawn(*shape) + layer
            found[f"layers.{layer}.{part}bias"] = drawn(shape[0]) - layer
    return found


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt", "x.bin"])
def test_files(tmp_path: Path, name: str) -> None:
    tensors = {"a": drawn(2, 3), "b": drawn(1)}
    path = tmp_path / name
    save_file(tensors, path) if name.endswith("safetensors") else torch.save(tensors, path)
    found = load_tensors(str(path), "qfilter", "filters", FACTS)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize(
    "names", [["model.safetensors", "other.safetensors"], ["pytorch_model.bin"], ["a.safetensors"]]
)
def test_folders(tmp_path: Path, names: list[str]) -> None:
    """The first of the usual names, else any file of safetensors."""
    for i, name in enumerate(names):
        content = {"a": torch.full((1,), float(i))}
        save_file(content, tmp_path / name) if name.endswith("safetensors") else torch.save(content, tmp_path / name)
    assert load_tensors(str(tmp_path), "qfilter", "filters", FACTS)["a"] == 0


def test_a_file_that_was_written_anew_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    for value in (1.0, 2.0):
        torch.save({"a": torch.tensor(value)}, path)
        os.utime(path, ns=(0, int(value)))  # clocks of file systems are coarse
        assert load_tensors(str(path), "qfilter", "filters", FACTS)["a"] == value


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("made-by-a-pickle",)


def test_code_in_a_file_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"q_filters": Evil()}, "evil.pt")
    Path("plain.bin").write_bytes(pickle.dumps(Evil(), protocol=2))
    for name in ("evil.pt", "plain.bin"):
        with pytest.raises(
            PressError, match=r"^qfilter: .* holds more than tensors; code in it is never run\); give filters="
        ):
            QFilter(filters=name).assets(FACTS)
    assert not Path("made-by-a-pickle").exists()


@pytest.mark.parametrize("name", ["empty.pt", "empty.safetensors", "list.pt", "text.safetensors"])
def test_what_is_no_file_of_tensors(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"no tensors at all" if name.startswith("text") else b"")
    if name == "list.pt":
        torch.save([1], path)
    with pytest.raises(
        PressError, match=r"^qfilter: nothing to load from .*; give filters= a local file or folder"
    ) as error:
        QFilter(filters=str(path)).assets(FACTS)
    assert "\n" not in str(error.value)


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(PressError, match=r"the folder holds none of model\.safetensors, .*give surrogate="):
        KVzap(surrogate=str(tmp_path)).assets(FACTS)


@pytest.mark.parametrize(
    ("press", "source"),
    [
        (QFilter(), "nthngdy/Llama-x_qfilt"),
        (KVzap(), "nvidia/KVzap-mlp-Meta-Llama-x"),
        (KVzap(model_type="linear"), "nvidia/KVzap-linear-Meta-Llama-x"),
        (ExpectedAttentionStats(), "alessiodevoto/exp_att_stats_someone_Meta-Llama-x_kmfoda_booksum_100_1000_4"),
        (QFilter(filters="no-such-file.safetensors"), "no-such-file.safetensors"),
    ],
)
def test_without_the_hub(press: Press, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name that the authors gave to the model's tensors is looked for; offline the error says what to give."""
    asked = []

    def refuse(repository: str, name: str) -> str:
        asked.append((repository, name))
        raise LocalEntryNotFoundError("not in the cache, and offline\nmore lines")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(PressError) as error:
        press.assets(FACTS)
    assert asked == [(source, "model.safetensors"), (source, "pytorch_model.bin")]
    text = str(error.value)
    assert f"{press.name}: nothing to load from {source!r} for the model 'someone/Meta-Llama-x'" in text
    assert "(FileNotFoundError: not in the cache, and offline); give " in text
    assert "`kvpass calibrate`" in text


def test_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"q_filters": drawn(2, 2, 16)}, tmp_path / "model.safetensors")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repository, name: str(tmp_path / name))
    assert QFilter().assets(FACTS)["q_filters"].shape == (2, 2, 16)


@pytest.mark.parametrize(
    ("press", "tensors", "message"),
    [
        (QFilter(), {"filters": drawn(1)}, "no tensor 'q_filters', it holds filters; .*calibrate --method qfilter"),
        (QFilter(), {}, "no tensor 'q_filters', it holds nothing"),
        (
            ExpectedAttentionStats(),
            {"query_mean": drawn(2, 4, 16)},
            "no tensor 'query_cov', it holds query_mean; .*--method expected_attention_stats",
        ),
        (QFilter(), {"q_filters": drawn(2, 4, 16)}, r"q_filters of .* is \[2, 4, 16\], this model needs \[2, 2, 16\]"),
        (
            ExpectedAttentionStats(),
            {"query_mean": drawn(2, 4, 16), "query_cov": drawn(2, 4, 16)},
            r"query_cov of .* is \[2, 4, 16\], this model needs \[2, 4, 16, 16\]; it was made for another model",
        ),
        (
            KVzap(),
            kvzap_tensors("linear"),
            r"no tensor 'layers.0.0.weight'; it holds 4 tensors .*model_type='mlp' right",
        ),
        (KVzap("linear"), kvzap_tensors("linear", layers=1), r"no tensor 'layers.1.weight'"),
        (
            KVzap(),
            {**kvzap_tensors("mlp"), "layers.0.2.weight": drawn(3, 8), "layers.1.2.weight": drawn(3, 8)},
            "weight",
        ),
    ],
)
def test_wrong_content(tmp_path: Path, press: Press, tensors: dict[str, Tensor], message: str) -> None:
    """Always a PressError with the name of the press and the file."""
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    option = {"qfilter": "filters", "kvzap": "surrogate"}.get(press.name, "stats_folder")
    with pytest.raises(PressError, match=f"^{press.name}: .*{message}") as error:
        type(press)(**{**vars(press), option: str(path)}).assets(FACTS)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("model_type", ["linear", "mlp"])
def test_kvzap_files(tmp_path: Path, model_type: Any) -> None:
    """Every layer gets its own network; hidden sizes may differ between files."""
    tensors = kvzap_tensors(model_type, hidden=5)
    save_file(tensors, tmp_path / "model.safetensors")
    press = KVzap(model_type, str(tmp_path))
    found = press.assets(FACTS)
    last = "" if model_type == "linear" else "2."
    assert torch.equal(found["out_weight"][1], tensors[f"layers.1.{last}weight"])
    assert torch.equal(found["out_bias"][0], tensors[f"layers.0.{last}bias"])
    check_press(press, captured_model("llama"), lengths=(70,))


def test_a_file_of_another_model_is_refused_at_compile(tmp_path: Path) -> None:
    save_file({"q_filters": drawn(3, 2, 16)}, tmp_path / "x.safetensors")
    press = QFilter(filters=str(tmp_path / "x.safetensors"))
    with pytest.raises(PressError, match=r"is \[3, 2, 16\], this model needs \[2, 2, 16\]"):
        kvpass.compile(captured_model("llama"), press=press, ratio=0.5, backend="eager")


def test_tensors_take_the_dtype_of_the_model(tmp_path: Path) -> None:
    save_file({"q_filters": drawn(2, 2, 16).to(torch.float64)}, tmp_path / "x.safetensors")
    press = QFilter(filters=str(tmp_path / "x.safetensors"))
    model = kvpass.compile(captured_model("llama"), press=press, ratio=0.5, backend="eager")
    assert model.prefill(token_ids(1, 60)).past_key_values.kept(0) == 30


def test_shapes_with_any_size() -> None:
    expect_shape("kvzap", "file", "weight", torch.zeros(2, 5), (2, None))
    with pytest.raises(PressError, match=r"weight of file is \[2, 5\], this model needs \[2, 'any', 1\]"):
        expect_shape("kvzap", "file", "weight", torch.zeros(2, 5), (2, None, 1))


@pytest.mark.parametrize(
    ("model", "plain", "shortened"),
    [
        ("meta-llama/Meta-Llama-3.1-8B-Instruct", "Meta-Llama-3.1-8B-Instruct", "Llama-3.1-8B-Instruct"),
        ("meta-llama/Meta-Llama-3.1-405B", "Meta-Llama-3.1-405B", "Meta-Llama-3.1-405B"),
        ("some/folder/", "folder", "folder"),
        ("", "unknown", "unknown"),
    ],
)
def test_short_names(model: str, plain: str, shortened: str) -> None:
    assert (short_name(model), short_name(model, meta_llama=True)) == (plain, shortened)
