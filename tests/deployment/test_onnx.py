"""ONNX models: the numbers and the text of the model, state where it lies, weights once."""

import json
import timeit
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import token_ids
from tiny_models import tiny_model
from torch import Tensor, nn

import kvpass
from kvpass import CompiledModel
from kvpass.errors import InputError, PackageError

onnx = pytest.importorskip("onnx", reason="the extra kvpass[onnx] is not installed")
pytest.importorskip("onnxscript", reason="the extra kvpass[onnx] is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra kvpass[onnx] is not installed")

from kvpass.backends.onnx import OnnxRunner, convert, write_phases  # noqa: E402
from kvpass.backends.onnx.files import INSIDE, PAGE  # noqa: E402
from kvpass.backends.onnx.names import STATE, WEIGHTS  # noqa: E402
from kvpass.backends.onnx.session import Session, session_options  # noqa: E402

LENGTHS = (41, 118, 250)  # none of them an example's
PRESSES = (  # architecture, layers, press
    ("llama", 2, "snapkv(window_size=8)"),
    ("llama", 1, "knorm"),
    ("llama", 1, "expected_attention"),
    ("llama", 1, "streaming_llm"),
    ("llama", 1, "chunkkv(snapkv(window_size=8), chunk_length=5)"),
    ("llama", 1, "key_rerotation(knorm)"),
    ("gemma3_text", 2, "snapkv(window_size=8)"),  # a ring, tied embeddings
)
Export = Callable[[str, int, str], "Package"]
Package = tuple[CompiledModel, Path]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Export]:
    """Models and what they were exported to, each once; extend and decode of an architecture are converted once."""
    made: dict[tuple[str, int, str], Package] = {}
    captured: dict[tuple[str, int], kvpass.CapturedModel] = {}
    known: dict[object, Any] = {}
    convert_phase = convert.converted

    def once(phase: str, program: Any, **options: Any) -> Any:
        if phase not in ("extend", "decode"):
            return convert_phase(phase, program, **options)
        key = (phase, next(iter(program.state_dict.values())).data_ptr())
        if key not in known:
            known[key] = convert_phase(phase, program, **options)
        return known[key].clone()

    def exported(arch: str, layers: int, press: str) -> Package:
        if (arch, layers) not in captured:
            captured[arch, layers] = kvpass.capture_model(tiny_model(arch, num_hidden_layers=layers))
        if (arch, layers, press) not in made:
            model = kvpass.compile(captured[arch, layers], press, ratio=0.5, backend="eager")
            folder = tmp_path_factory.mktemp("onnx") / "package"
            model.export(folder, format="onnx", max_tokens=300)
            made[arch, layers, press] = (model, folder)
        return made[arch, layers, press]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert, "converted", once)
        yield exported


def distinct(tokens: int) -> Tensor:
    """Ids without repeats: keys of equal tokens have equal norms, up to rounding that differs between runtimes."""
    return 3 + torch.randperm(250, generator=torch.Generator().manual_seed(tokens))[None, :tokens]


@pytest.mark.parametrize(("arch", "layers", "press"), PRESSES)
def test_same_numbers_and_same_text(package: Export, arch: str, layers: int, press: str) -> None:
    """Prefill keeps what the model keeps; a question and single tokens behind it; greedy text; a short prompt."""
    model, folder = package(arch, layers, press)
    loaded: Any = kvpass.load(folder)
    for tokens in LENGTHS:
        ids, question = distinct(tokens), token_ids(1, 6, seed=1)
        out = model.prefill(ids)
        logits, state = loaded.prefill(ids)
        torch.testing.assert_close(logits, out.logits, atol=5e-5, rtol=1e-4)
        for layer, held in enumerate(out.past_key_values.layout.layers):
            kept = out.past_key_values.kept(layer)
            if held.ring is None:
                torch.testing.assert_close(
                    state.tensors[f"keys_{layer}"][:, :, :kept], out.past_key_values.keys(layer), atol=5e-5, rtol=1e-4
                )
        for more in (question, question[:, :1]):
            expected = model(input_ids=more, past_key_values=out.past_key_values).logits
            torch.testing.assert_close(loaded.append(more, state), expected, atol=5e-5, rtol=1e-4)
        expected = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=255)
        assert torch.equal(loaded.generate(ids, 12, eos_token_id=255), expected)
    ids = token_ids(1, 2)  # too short for some presses: read by extend, over an empty cache
    expected = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=255)
    assert torch.equal(loaded.generate(ids, 12, eos_token_id=255), expected)


@pytest.mark.parametrize(("arch", "layers", "press"), [PRESSES[0], PRESSES[-1]])
def test_models_are_valid(package: Export, arch: str, layers: int, press: str, tmp_path: Path) -> None:
    _, folder = package(arch, layers, press)
    for phase in ("prefill", "extend", "decode"):
        path = folder / f"{phase}.onnx"
        onnx.checker.check_model(path, full_check=True)
        onnx.shape_inference.infer_shapes_path(path, tmp_path / "inferred.onnx", strict_mode=True, data_prop=True)
        model = onnx.load(path, load_external_data=False)
        assert {opset.domain for opset in model.opset_import} == {""} and not model.functions
        assert str(Path.cwd()) not in str(model) and "site-packages" not in str(model)
    sizes = {
        value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    layer = 1  # a full one of Gemma 3
    assert sizes[f"keys_{layer}"] == sizes[f"values_{layer}{STATE}"] == [1, 2, f"C_{layer}", 16]
    told = json.loads((folder / "manifest.json").read_text())
    assert [port["name"] for port in told["phases"][-1]["inputs"]] == [value.name for value in model.graph.input]


@pytest.mark.parametrize(("arch", "layers", "press"), [PRESSES[0], PRESSES[-1]])
def test_weights_are_stored_once(package: Export, arch: str, layers: int, press: str) -> None:
    """Of all phases, and those of tied embeddings; nothing else is large."""
    model, folder = package(arch, layers, press)
    parameters = {p.data_ptr(): p.nbytes for p in model.weights.parameters() if p.nbytes > INSIDE}
    weights, padding = sum(parameters.values()), PAGE * len(parameters)
    assert weights <= (folder / WEIGHTS).stat().st_size <= weights + padding
    assert sum(path.stat().st_size for path in folder.glob("*.onnx")) < 250_000


def test_state_is_updated_where_it_lies(package: Export, tmp_path: Path) -> None:
    """A token writes itself into a cache of 64 MiB; no operator makes or copies one."""
    _, folder = package(*PRESSES[0])
    options = session_options(1)
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    session = Session(folder / "decode.onnx", options)
    slots = 2**19
    state: dict[str, Tensor] = {
        f"{role}_{layer}": torch.zeros(1, 2, slots, 16) for layer in range(2) for role in ("keys", "values")
    }
    pointers = {name: tensor.data_ptr() for name, tensor in state.items()}
    counts = {"lengths": torch.full((2, 1), 7), "next_position": torch.tensor([7])}
    for _ in range(3):
        assert session.run({"input_ids": token_ids(1, 1), **counts, **state}).keys() == {"logits"}
    assert counts["lengths"].tolist() == [[10], [10]] and counts["next_position"].tolist() == [10]
    for name, tensor in state.items():
        assert tensor.data_ptr() == pointers[name]
        assert tensor[:, :, 7:10].abs().amin(dim=(0, 1, 3)).gt(0).all()
        assert not tensor[:, :, :7].any() and not tensor[:, :, 10:].any()
    events = json.loads(Path(session._session.end_profiling()).read_text())
    kernels = [event for event in events if event["name"].endswith("_kernel_time")]
    large = [event for event in kernels if int(event["args"]["output_size"]) >= state["keys_0"].nbytes]
    assert {event["args"]["op_name"] for event in large} == {"ScatterND"}
    copied = min(timeit.repeat(state["keys_0"].clone, number=1, repeat=3))
    assert min(event["dur"] for event in large) * 1e-6 < copied / 10


def test_wrong_inputs(package: Export) -> None:
    runner = OnnxRunner(package(*PRESSES[0])[1], ["prefill"], threads=1)
    with pytest.raises(InputError, match="input_ids, which is not among"):
        runner.run("prefill", {})
    with pytest.raises(InputError, match="contiguous"):
        runner.run("prefill", {"input_ids": token_ids(40, 2).T})


class Operators(nn.Module):
    """What some presses compute, of x [2, 3, n, 5]."""

    def forward(self, x: Tensor, index: Tensor) -> dict[str, Tensor]:
        gram = x.mT @ x + 0.1 * torch.eye(5)
        factor, info = torch.linalg.cholesky_ex(gram)
        _, failed = torch.linalg.cholesky_ex(-gram)
        turned = gram.flip(-1)  # needs row pivots
        rounded = (x * 2).round()  # with ties
        best = rounded.topk(x.shape[2] // 3, dim=2)
        order = rounded.argsort(dim=2, descending=True, stable=True)
        return {
            "factor": factor,
            "info": info,
            "failed": failed,
            "solved": torch.linalg.solve(turned, x.mT),
            "triangular": torch.linalg.solve_triangular(factor, x.mT, upper=False),
            "median": x.median(dim=2).values,
            "median_kept": x.median(dim=2, keepdim=True).values,
            "sorted": order,
            "ascending": rounded.sort(dim=2, stable=True).indices,
            "threshold": best.values[:, :, -1],
            "put": x.index_put((torch.arange(2)[:, None], torch.arange(3), index[:, None]), x[:, :, 0]),
            "scattered": torch.slice_scatter(x, x[:, :, :4] * 2, 2, 3, 7),
            "tiny": x * 0 + 1e-8,
        }


def run_module(module: nn.Module, folder: Path, **inputs: Tensor) -> dict[str, Tensor]:
    """What ONNX Runtime makes of a module that was exported at another length."""
    example = {name: torch.cat([x, x], dim=2) if x.dim() == 4 else x for name, x in inputs.items()}
    axes = {name: {2: torch.export.Dim.DYNAMIC} if x.dim() == 4 else None for name, x in inputs.items()}
    program = torch.export.export(module, (), example, dynamic_shapes=axes, strict=False)
    write_phases({"phase": program}, folder)
    session = onnxruntime.InferenceSession(folder / "phase.onnx", providers=["CPUExecutionProvider"])
    values = session.run(None, {name: x.numpy() for name, x in inputs.items()})
    return {out.name: torch.from_numpy(value) for out, value in zip(session.get_outputs(), values, strict=True)}


def test_operators(tmp_path: Path) -> None:
    """Those that are translated here: equal values in ties, negative definite matrices, constants near 0."""
    x, index = torch.randn(2, 3, 23, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 21])
    found, expected = run_module(Operators(), tmp_path, x=x, index=index), Operators()(x, index)
    assert found.pop("failed").ne(0).all() and expected.pop("failed").ne(0).all()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].to(tensor.dtype), tensor, atol=2e-5, rtol=2e-5, msg=name)


class Attention(nn.Module):
    """Queries q [2, H, n, 6] over 2 KV heads, with all kinds of masks."""

    def forward(self, q: Tensor, k: Tensor) -> dict[str, Tensor]:
        def attend(mask: Tensor | None, is_causal: bool = False) -> Tensor:
            options: dict[str, Any] = {"is_causal": is_causal, "scale": 0.3, "enable_gqa": q.shape[1] != 2}
            return nn.functional.scaled_dot_product_attention(q, k, k[..., :4], mask, **options)

        number = torch.arange(q.shape[2])
        seen = number <= number[:, None]
        head = torch.arange(1, q.shape[1] + 1)[:, None, None]
        return {
            "none": attend(None),
            "causal": attend(None, is_causal=True),
            "bool": attend(seen),
            "of_all_heads": attend(seen[None, None]),
            "per_head": attend((number <= number[:, None] * head)[None]),
            "per_row_and_head": attend((number <= number[:, None] * head).expand(2, -1, -1, -1)),
            "float": attend(seen.to(q.dtype)),
        }


@pytest.mark.parametrize("heads", [2, 6])
def test_attention(heads: int, tmp_path: Path) -> None:
    q, k = torch.randn(2, heads, 9, 6), torch.randn(2, 2, 9, 6)
    found, expected = run_module(Attention(), tmp_path, q=q, k=k), Attention()(q, k)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-5, msg=name)


class Singular(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": x.sum(), "keys_0": x * 2, "keys_3": x * torch.linalg.svdvals(x)[..., None, :]}


def test_what_cannot_be_written(tmp_path: Path) -> None:
    """An operator is named with its layer; nothing is left behind."""
    with pytest.raises(PackageError, match=r"phase: aten\.\w*svd\S* in layer 3 has no form in ONNX"):
        run_module(Singular(), tmp_path / "package", x=torch.randn(1, 2, 7, 5))
    assert not (tmp_path / "package").exists()
    model = nn.Linear(5, 5, dtype=torch.bfloat16)
    program = torch.export.export(model, (torch.zeros(2, 5, dtype=torch.bfloat16),), strict=False)
    with pytest.raises(PackageError, match=r"weight is bfloat16.*model\.float\(\)"):
        write_phases({"phase": program}, tmp_path / "package")


def test_without_the_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PackageError, match=r"onnx and onnxscript must be installed .*kvpass\[onnx\]"):
        write_phases({}, tmp_path)
    with pytest.raises(PackageError, match="onnxruntime must be installed"):
        OnnxRunner(tmp_path, [])
