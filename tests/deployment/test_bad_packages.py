"""What is refused, and that nothing half-written is left."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from deployment.packages import LONGEST, model_with
from models import compiled_model, token_ids

import kvpass
from kvpass.backends import exported_program
from kvpass.errors import CacheError, InputError, PackageError


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("good") / "package"
    model_with("llama", "knorm").export(path, max_tokens=LONGEST)
    return path


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    shutil.copytree(good, tmp_path / "package")
    return tmp_path / "package"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "torchscript"}, r"there is no format 'torchscript'; known are exported_program, aot_inductor"),
        ({"guard": "nobody"}, r"there is no guard 'nobody'; known are host, in_graph"),
        ({"batch_size": 0}, r"batch_size is 0, expected a number of rows"),
        ({"format": "aot_inductor"}, r"a file whose name ends in \.pt2"),
        ({"format": "aot_inductor", "guard": "in_graph"}, r"take format='exported_program'"),
        ({"capacity": 100}, r"capacity=100 is for guard='in_graph'"),
        ({"guard": "in_graph", "capacity": 100}, r"capacity=100: 150 are kept of 300 tokens"),
    ],
)
def test_options(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(PackageError, match=message):
        model_with("llama", "knorm").export(tmp_path / "package", **{"max_tokens": LONGEST, **options})
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(good: Path) -> None:
    with pytest.raises(PackageError, match="exists; give another path"):
        model_with("llama", "knorm").export(good)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="cannot be written to"):
        model_with("llama", "knorm").export(tmp_path / "nowhere" / "package", max_tokens=LONGEST)


def test_nothing_half_written_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exported_program.torch.export, "save", full)
    with pytest.raises(PackageError, match="No space left"):
        model_with("llama", "knorm").export(tmp_path / "package", max_tokens=LONGEST)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["decode.pt2", "graphs/prefill.txt"])
@pytest.mark.parametrize("harm", ["truncated", "changed", "missing"])
def test_files_that_changed(folder: Path, name: str, harm: str) -> None:
    path = folder / name
    data = path.read_bytes()
    if harm == "missing":
        path.unlink()
    else:
        path.write_bytes(data[:-7] if harm == "truncated" else data[:50] + b"x" + data[51:])
    with pytest.raises(PackageError, match=r"is missing or is not what was saved; copy the folder again"):
        kvpass.load(folder)


def test_other_releases(folder: Path) -> None:
    told = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**told, "torch": "2.9"}, indent=1))
    with pytest.raises(
        PackageError, match=r"was exported by kvpass \S+ and torch 2\.9, this is .*export the model again"
    ):
        kvpass.load(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "kvpass-package-1"}'])
def test_a_manifest_that_is_none(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_text(text)
    with pytest.raises(PackageError, match="wrote"):
        kvpass.load(folder)


def test_a_file_that_is_no_package(tmp_path: Path) -> None:
    (tmp_path / "text.pt2").write_text("no archive")
    torch.save({"a": torch.ones(2)}, tmp_path / "pickle.pt2")
    for name in ("text.pt2", "pickle.pt2"):
        with pytest.raises(PackageError, match=r"no complete package that CompiledModel\.export wrote"):
            kvpass.load(tmp_path / name)


def test_a_package_for_a_device_that_is_not_here(folder: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    told = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**told, "device": "cuda:0"}, indent=1))
    with pytest.raises(PackageError, match="exported for cuda:0, which is not here"):
        kvpass.load(folder)


def test_nothing_is_unpickled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of torch.export hold tensors; torch reads those with `weights_only`."""
    import pickle

    def refused(*arguments: object, **options: object) -> None:
        raise AssertionError("unpickled")

    monkeypatch.setattr(pickle, "Unpickler", refused)
    monkeypatch.setattr(pickle, "load", refused)
    monkeypatch.setattr(pickle, "loads", refused)
    assert kvpass.load(folder).generate(token_ids(1, 20), 2).shape == (1, 22)


def test_inputs(good: Path) -> None:
    loaded = kvpass.load(good)
    with pytest.raises(PackageError, match="301 tokens at once, this package was exported for up to 300"):
        loaded.prefill(token_ids(1, 301))
    for ids in (token_ids(2, 9), token_ids(1, 9).float(), token_ids(1, 9)[0], token_ids(1, 0)):
        with pytest.raises(InputError, match=r"this package takes int64 \[1, tokens\]"):
            loaded.prefill(ids)
    _, state = loaded.prefill(token_ids(1, 300))
    state.seen = loaded.manifest.max_tokens
    with pytest.raises(InputError, match="positions end at"):
        loaded.append(token_ids(1, 1), state)


def test_the_capacity_of_a_guarded_package(tmp_path: Path) -> None:
    compiled_model("llama", "knorm", ratio=0.5).export(
        tmp_path / "package", guard="in_graph", max_tokens=60, capacity=40
    )
    loaded = kvpass.load(tmp_path / "package")
    logits, state = loaded.prefill(token_ids(1, 60))
    with pytest.raises(CacheError, match=r"layer 0 holds 40 entries, 41 are needed; export with capacity="):
        for _ in range(20):
            logits = loaded.append(logits.argmax(dim=-1), state)


def test_a_read_only_folder(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    tmp_path.chmod(0o555)
    with pytest.raises(PackageError, match="cannot be written to"):
        model_with("llama", "knorm").export(tmp_path / "package", max_tokens=LONGEST)
