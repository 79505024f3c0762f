"""A compiled model goes to a folder and comes back, without a capture and without a pass."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from models import compiled_model, token_ids
from tiny_models import ARCHITECTURES

import kvpass
import kvpass.api
from kvpass.errors import PackageError, PressError
from kvpass.pass_manager import PassManager
from kvpass.presses import Knorm
from kvpass.registry import parse_press, press_text
from kvpass.runtime import model_files


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> Any:
        raise AssertionError("this was saved")

    monkeypatch.setattr(kvpass.api, "capture", fail)
    monkeypatch.setattr(PassManager, "run", fail)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "llama"
    compiled_model("llama", "snapkv(window_size=8)", ratio=0.5).save(folder)
    return folder


def talk(model: kvpass.CompiledModel) -> list[torch.Tensor]:
    """Greedy, several rows and one, and a question behind a kept cache."""
    said = []
    for batch in (1, 2):
        ids = token_ids(batch, 60)
        out = model.generate(ids, max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
        cache = out.past_key_values
        answer = model(input_ids=token_ids(batch, 7, seed=1), past_key_values=cache)
        said += [out.sequences, answer.logits, cache.positions(1), cache.keys(1)]
    return said


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_it_says_the_same(arch: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    model = compiled_model(arch, "chunkkv(snapkv(window_size=8), chunk_length=5)", ratio=0.5)
    expected = talk(model)
    model.save(tmp_path / "model")
    request.getfixturevalue("no_work")
    loaded = kvpass.load(tmp_path / "model")
    for found, wanted in zip(talk(loaded), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    assert type(loaded.config) is type(model.config)
    assert loaded.config.to_dict() == model.config.to_dict()
    assert loaded.generation_config == model.generation_config
    for phase in ("prefill", "extend", "decode"):
        assert loaded.print_graph(phase) == model.print_graph(phase)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_options_come_back(tmp_path: Path) -> None:
    model = compiled_model("llama", "knorm", target_size=20, layers=[1], capacity=300)
    model.save(tmp_path / "model")
    loaded = kvpass.load(tmp_path / "model")
    cache = loaded.prefill(token_ids(1, 60)).past_key_values
    assert [cache.kept(layer) for layer in range(2)] == [60, 20]
    assert cache.buffers(0)[0].shape[2] == 300
    model.prefill(token_ids(1, 60)).past_key_values.save(tmp_path / "cache")
    again = kvpass.CompressedCache.load(tmp_path / "cache")  # of the same model, so they go together
    assert loaded(input_ids=token_ids(1, 3), past_key_values=again).logits.shape == (1, 3, 256)


def test_without_a_press(tmp_path: Path) -> None:
    model = compiled_model("qwen3")
    model.save(tmp_path / "model")
    ids = token_ids(2, 40)
    torch.testing.assert_close(kvpass.load(tmp_path / "model").prefill(ids).logits, model.prefill(ids).logits)


def test_a_press_that_is_not_ours_is_spliced_anew(tmp_path: Path) -> None:
    """Its code may have changed; the capture is there."""

    @kvpass.register_press("from_elsewhere")
    class FromElsewhere(Knorm):
        """As a third party writes one."""

    model = compiled_model("llama", FromElsewhere(), ratio=0.5)
    model.save(tmp_path / "model")
    ids = token_ids(1, 60)
    torch.testing.assert_close(kvpass.load(tmp_path / "model").prefill(ids).logits, model.prefill(ids).logits)


def test_weights_are_stored_once(saved: Path, tmp_path: Path) -> None:
    model = compiled_model("llama")
    own = {p.data_ptr(): p.nbytes for p in model.weights.parameters()}
    assert (saved / "weights.safetensors").stat().st_size < sum(own.values()) + 20_000
    tied = kvpass.load(saved)
    count = len({p.data_ptr() for p in tied.weights.parameters()})
    assert count == len(own)


def test_nothing_is_overwritten(saved: Path) -> None:
    with pytest.raises(PackageError, match="exists; give another path"):
        compiled_model("llama").save(saved)


def test_nothing_half_written_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model_files, "save_file", full)
    with pytest.raises(PackageError, match="No space left"):
        compiled_model("llama").save(tmp_path / "model")
    assert not list(tmp_path.iterdir())
    with pytest.raises(PackageError, match="cannot be written"):
        compiled_model("llama").save(tmp_path / "nowhere" / "model")


def test_a_function_as_backend_has_no_file(tmp_path: Path) -> None:
    model = compiled_model("llama", backend=lambda module, inputs: module.forward)
    with pytest.raises(PackageError, match="compile with a name"):
        model.save(tmp_path / "model")


@pytest.mark.parametrize("name", ["weights.safetensors", "graphs/located.json", "config.json"])
@pytest.mark.parametrize("how", ["truncated", "changed", "missing"])
def test_files_that_changed_are_refused(saved: Path, tmp_path: Path, name: str, how: str) -> None:
    folder = shutil.copytree(saved, tmp_path / "copy")
    content = (folder / name).read_bytes()
    if how == "missing":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content[:-10] if how == "truncated" else content[:-10] + b"0123456789")
    with pytest.raises(PackageError, match=f"{name} is missing or is not what was saved"):
        kvpass.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kvpass": "0.0.0"}, "was saved by kvpass 0.0.0"),
        ({"torch": "1.0"}, r"and torch 1\.0, this is"),
        ({"format": "kvpass-model-0"}, "its format is kvpass-model-0"),
    ],
)
def test_other_releases_are_refused(saved: Path, tmp_path: Path, change: dict[str, str], message: str) -> None:
    folder = shutil.copytree(saved, tmp_path / "copy")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | change))
    with pytest.raises(PackageError, match=message):
        kvpass.load(folder)


def test_another_folder_is_refused(tmp_path: Path) -> None:
    for made in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(PackageError, match=r"no folder that CompiledModel.save wrote"):
            kvpass.load(made)


def test_presses_as_text() -> None:
    for text in ("snapkv", "chunkkv(snapkv(window_size=8), chunk_length=5)", "per_layer(knorm, [0.1, 0.5])"):
        press = parse_press(text)
        assert parse_press(press_text(press)) == press

    class Odd(Knorm):
        """Not registered: its name is that of its base."""

    def made() -> type[Knorm]:
        @kvpass.register_press("twice")
        class Twice(Knorm):
            """Defined again, as in a notebook: the name is that of the later one."""

        return Twice

    earlier = made()
    made()
    with pytest.raises(PressError, match="is another press"):
        press_text(earlier())
    with pytest.raises(PressError, match=r"Odd has no name for files; write @kvpass.register_press"):
        press_text(Odd())
