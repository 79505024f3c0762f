"""Programs of torch.export that run where there is nothing but torch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from deployment.packages import LENGTHS, LONGEST, NEW, PRESSES, bytes_of_weights, check_greedy, expected, model_with
from models import compiled_model, token_ids
from torch.export import export

import kvpass
from kvpass.deployment.deployed import DeployedModel

ALONE = """
import json, sys, torch
assert not any(name.split(".")[0] in ("kvpass", "transformers") for name in sys.modules)
folder = sys.argv[1]
manifest = json.load(open(f"{folder}/manifest.json"))
phases = {phase["name"]: phase for phase in manifest["phases"]}
run = {name: torch.export.load(f"{folder}/{name}.pt2").module() for name in phases}
ids = torch.tensor([json.loads(sys.argv[2])])
out = run["prefill"](ids)
text, state = [], {}
for port in phases["decode"]["inputs"]:
    if port["role"] in ("keys", "values"):
        kept = out[port["name"]]
        state[port["name"]] = torch.cat([kept, torch.zeros(*kept.shape[:2], 32, kept.shape[3])], dim=2)
    elif port["role"] != "input_ids":
        state[port["name"]] = out[port["name"]]
logits = out["logits"]
for _ in range(int(sys.argv[3])):
    text.append(logits[0, -1].argmax().item())
    given = {**state, "input_ids": torch.tensor([[text[-1]]])}
    logits = run["decode"](*[given[port["name"]] for port in phases["decode"]["inputs"]])["logits"]
assert not any(name.split(".")[0] in ("kvpass", "transformers") for name in sys.modules)
print(json.dumps(text))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "snapkv"
    model_with("llama", PRESSES[1]).export(path, max_tokens=LONGEST)
    return path


RINGS = [
    ("gemma3_text", "snapkv(window_size=8)"),
    pytest.param("gemma3_text", "key_rerotation(knorm)", marks=pytest.mark.exhaustive),
]


@pytest.mark.parametrize(("arch", "press"), [*(("llama", press) for press in PRESSES), *RINGS])
def test_greedy_text(arch: str, press: str, tmp_path: Path) -> None:
    """Gemma 3 has rings; of a prompt too short for the press everything is kept."""
    model_with(arch, press).export(tmp_path / "package", max_tokens=LONGEST)
    loaded = kvpass.load(tmp_path / "package")
    assert isinstance(loaded, DeployedModel)
    check_greedy(loaded, arch, press)


@pytest.mark.parametrize("press", [None, "pyramidkv(window_size=8)", "compactor", "lagkv(n_sink=2, lag_size=16)"])
def test_counts_that_are_no_share_of_the_prompt(press: str | None, tmp_path: Path) -> None:
    """Tables, scalars of the host, and a press with a graph for short prompts and one for long ones."""
    model_with("llama", press).export(tmp_path / "package", max_tokens=LONGEST)
    loaded = kvpass.load(tmp_path / "package")
    check_greedy(loaded, "llama", press)


def test_kept_as_by_the_model(folder: Path) -> None:
    loaded = kvpass.load(folder)
    for tokens in (9, 10, 100):  # 9: a single token beside the window
        out = model_with("llama", PRESSES[1]).prefill(token_ids(1, tokens))
        logits, state = loaded.prefill(token_ids(1, tokens))
        torch.testing.assert_close(logits, out.logits)
        for layer in range(2):
            kept = out.past_key_values.kept(layer)
            assert state.tensors["lengths"][layer].tolist() == [kept]
            torch.testing.assert_close(state.tensors[f"keys_{layer}"][:, :, :kept], out.past_key_values.keys(layer))


def test_two_rows(tmp_path: Path) -> None:
    model = model_with("qwen3", "expected_attention")
    model.export(tmp_path / "package", batch_size=2, max_tokens=LONGEST)
    ids = token_ids(2, 77)
    found = kvpass.load(tmp_path / "package").generate(ids, NEW)
    assert torch.equal(found, model.generate(ids, max_new_tokens=NEW, do_sample=False, pad_token_id=255))


def test_a_process_with_nothing_but_torch(folder: Path, tmp_path: Path) -> None:
    prompt = token_ids(1, 41)[0].tolist()
    command = [sys.executable, "-c", ALONE, str(folder), json.dumps(prompt), str(NEW)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path)
    assert json.loads(done.stdout) == expected("llama", PRESSES[1], 41)[0, 41:].tolist()


def test_caches_are_named_and_updated_in_place(folder: Path) -> None:
    program = torch.export.load(folder / "decode.pt2")
    assert list(program.graph_signature.user_inputs) == [
        "input_ids",
        "lengths",
        "next_position",
        *[f"{role}_{layer}" for layer in range(2) for role in ("keys", "values")],
    ]
    lowered = program.run_decompositions({})
    assert sorted(lowered.graph_signature.user_inputs_to_mutate.values()) == sorted(
        program.graph_signature.user_inputs[1:]
    )


def test_manifest(folder: Path) -> None:
    """What a C++ program goes by."""
    told = json.loads((folder / "manifest.json").read_text())
    assert (told["kind"], told["ratio"]) == ("exported_program", 0.5)
    assert told["press"] == "snapkv(window_size=8, kernel_size=5)"
    assert told["config"]["model_type"] == "llama"
    prefill, extend, decode = told["phases"]
    assert prefill["tokens"] == [[9, LONGEST]]
    assert [port["name"] for port in prefill["outputs"][:5]] == [
        "logits",
        "lengths",
        "next_position",
        "keys_0",
        "values_0",
    ]
    keys = prefill["outputs"][3]
    assert keys == {"name": "keys_0", "role": "keys", "layer": 0, "dtype": "float32", "shape": [1, 2, "S//2", 16]}
    assert (extend["tokens"], decode["tokens"]) == ([[2, LONGEST]], [[1, 1]])
    assert decode["inputs"][3]["shape"] == [1, 2, "C_0", 16]
    assert decode["writes"] == [port["name"] for port in decode["inputs"][1:]]


@pytest.mark.parametrize("name", ["prefill", "extend", "decode"])
def test_programs_can_be_exported_again(folder: Path, name: str) -> None:
    program = torch.export.load(folder / f"{name}.pt2")
    arguments = program.example_inputs[0]
    again = export(program.module(), arguments, strict=False).module()
    copies = [[tensor.clone() for tensor in arguments] for _ in range(2)]
    torch.testing.assert_close(again(*copies[0])["logits"], program.module()(*copies[1])["logits"])


def test_weights_are_held_once(folder: Path) -> None:
    loaded = kvpass.load(folder)
    held = [dict(module.named_parameters()) for module in loaded._runner._modules.values()]
    unique = {p.data_ptr(): p.nbytes for named in held for p in named.values()}
    assert sum(unique.values()) == bytes_of_weights(model_with("llama", PRESSES[1]))


@pytest.mark.parametrize(("arch", "press"), [("llama", PRESSES[1]), ("gemma3_text", "knorm"), ("llama", None)])
def test_the_guard_inside(arch: str, press: str | None, tmp_path: Path) -> None:
    """One program; 5 tokens are too few for the window, so they come padded and are kept whole."""
    model_with(arch, press).export(tmp_path / "package", guard="in_graph", max_tokens=LONGEST, capacity=LONGEST + 20)
    assert sorted(path.name for path in (tmp_path / "package").glob("*.pt2")) == ["model.pt2"]
    program = torch.export.load(tmp_path / "package" / "model.pt2")
    assert sum(node.target is torch.ops.higher_order.cond for node in program.graph.nodes) == 1
    check_greedy(kvpass.load(tmp_path / "package"), arch, press)


def test_more_tokens_than_room(folder: Path) -> None:
    """Buffers grow; a question of several tokens is read at once."""
    loaded, model = kvpass.load(folder), compiled_model("llama", PRESSES[1], ratio=0.5)
    logits, state = loaded.prefill(token_ids(1, 60), room=0)
    out = model.prefill(token_ids(1, 60))
    for seed, tokens in enumerate((7, 1, 150)):
        more = token_ids(1, tokens, seed=seed + 1)
        logits = loaded.append(more, state)
        torch.testing.assert_close(logits, model(input_ids=more, past_key_values=out.past_key_values).logits)
    assert state.nbytes >= sum(LENGTHS[:1])
