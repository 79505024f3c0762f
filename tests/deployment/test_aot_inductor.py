"""One file with compiled phases, from Python and from C++."""

import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from deployment.packages import (
    LENGTHS,
    LONGEST,
    NEW,
    PRESSES,
    bytes_of_weights,
    check_greedy,
    compile_once,
    expected,
    model_with,
)
from models import token_ids

import kvpass
from kvpass.deployment.manifest import Manifest
from kvpass.errors import PackageError

EXAMPLE = Path(__file__).parents[2] / "examples" / "cpp"


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A package for each press."""
    folder = tmp_path_factory.mktemp("packages")
    found = {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        compile_once(monkeypatch)
        for number, press in enumerate(PRESSES):
            found[press] = folder / f"{number}.pt2"
            model_with("llama", press).export(found[press], "aot_inductor", max_tokens=LONGEST)
    return found


@pytest.fixture(scope="module")
def generate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's program, built as its CMakeLists.txt says."""
    if not shutil.which("cmake") or not (shutil.which("c++") or shutil.which("g++")):
        pytest.skip("no cmake or no C++ compiler")
    folder = tmp_path_factory.mktemp("build")
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    for command in (["cmake", "-S", str(EXAMPLE), "-B", str(folder), prefix], ["cmake", "--build", str(folder)]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "generate"


@pytest.mark.parametrize("press", PRESSES)
def test_greedy_text(packages: dict[str, Path], press: str) -> None:
    check_greedy(kvpass.load(packages[press]), "llama", press)


@pytest.mark.parametrize("press", PRESSES)
def test_greedy_text_without_python(packages: dict[str, Path], generate: Path, press: str) -> None:
    for tokens in LENGTHS:
        ids = [str(number) for number in token_ids(1, tokens)[0].tolist()]
        done = subprocess.run([generate, packages[press], str(NEW), *ids], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        wanted = expected("llama", press, tokens)[0, tokens:].tolist()
        assert done.stdout.split() == [str(number) for number in wanted], tokens


def test_what_the_example_says_to_nonsense(packages: dict[str, Path], generate: Path, tmp_path: Path) -> None:
    def said(*arguments: object) -> str:
        done = subprocess.run([str(generate), *map(str, arguments)], capture_output=True, text=True)
        assert done.returncode == 1
        return done.stderr

    assert "not exported for 301 tokens" in said(packages["knorm"], 3, *range(301))
    assert "cannot be read" in said(tmp_path / "none.pt2", 3, 5)


def test_weights_are_stored_once(packages: dict[str, Path]) -> None:
    with zipfile.ZipFile(packages["knorm"]) as archive:
        stored = [entry.file_size for entry in archive.infolist() if "/data/weights/" in entry.filename]
        libraries = [archive.read(entry) for entry in archive.infolist() if entry.filename.endswith(".so")]
    weights = bytes_of_weights(model_with("llama", "knorm"))
    assert weights <= sum(stored) < weights + 1000  # RoPE's frequencies are no parameter
    weight = next(model_with("llama", "knorm").weights.parameters()).detach().numpy().tobytes()[:256]
    assert len(libraries) == 3
    assert not any(weight in library for library in libraries)


def test_weights_are_not_copied(packages: dict[str, Path]) -> None:
    """All phases read them where they lie in the file."""
    runner = kvpass.load(packages["knorm"])._runner
    memory = {tensor.untyped_storage().data_ptr() for tensor in runner._stored.values()}
    assert len(memory) == 1


def test_the_cache_is_updated_in_place(packages: dict[str, Path]) -> None:
    loaded = kvpass.load(packages["knorm"])
    logits, state = loaded.prefill(token_ids(1, 50), room=40)
    before = {name: tensor.data_ptr() for name, tensor in state.tensors.items()}
    for _ in range(30):
        logits = loaded.append(logits[:, -1:].argmax(dim=-1), state)
    assert {name: tensor.data_ptr() for name, tensor in state.tensors.items()} == before
    assert state.tensors["lengths"].tolist() == [[55], [55]]


def test_a_package_without_its_weights_raises(packages: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that runs without them takes the process down."""
    read = Manifest.from_json

    def less(text: str, where: str) -> Manifest:
        found = read(text, where)
        found.weights["decode"].pop("lm_head.weight", None) or found.weights["decode"].popitem()
        return found

    monkeypatch.setattr(Manifest, "from_json", less)
    with pytest.raises(PackageError, match="decode lacks the weights"):
        kvpass.load(packages["knorm"])
