"""RoPE at other positions is the captured model's own, whatever its scaling."""

from typing import Any

import pytest
import torch
from models import token_ids
from tiny_models import tiny_model

import kvpass
from kvpass.ir.attention_site import attention_sites
from kvpass.ir.taps import Taps

BASE = {"rope_theta": 10000.0}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0] * 8,
        "long_factor": [1.0 + 0.5 * i for i in range(8)],
        "original_max_position_embeddings": 64,
        "factor": 4.0,
    },
}


def scaled_model(kind: str) -> Any:
    if kind == "gemma3":  # two frequency sets in one model
        return tiny_model("gemma3_text")
    if kind == "partial":  # half of each head is rotated
        partial = {"partial_rotary_factor": 0.5, "rope_type": "default", **BASE}
        return tiny_model("phi3", rope_parameters=partial, partial_rotary_factor=0.5)
    return tiny_model("llama", rope_parameters={**BASE, **SCALINGS[kind]}, max_position_embeddings=256)


@pytest.mark.parametrize("kind", [*SCALINGS, "partial", "gemma3"])
def test_keys_at_other_positions_are_the_models_own(kind: str) -> None:
    """Keys before RoPE, rotated to shifted positions by the tap, are the keys of the model at those positions."""
    model = scaled_model(kind)
    program = kvpass.capture_model(model).graphs.located
    ids = token_ids(1, 100)
    taps = Taps(program)
    for site in attention_sites(program):
        layer = taps.of_layer(site)
        values = _run(program, ids, torch.arange(100)[None])
        constants = {name: program.attribute(node) for name, node in layer.constants.items()}
        rope = layer.ropes(program, constants)["key_rope"]
        pre = values[layer.nodes["keys_pre_rope"].name]
        shifted = torch.arange(100)[None] + 7
        found = rope.rotate(pre, rope.frequencies(shifted))  # type: ignore[union-attr]
        if site.layer == 0:  # deeper layers see other hidden states at other positions
            expected = _run(program, ids, shifted)[site.keys.name]
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        again = rope.rotate(pre, rope.frequencies(torch.arange(100)[None]))  # type: ignore[union-attr]
        torch.testing.assert_close(again, values[site.keys.name], atol=1e-6, rtol=1e-6)


def _run(program: Any, ids: torch.Tensor, positions: torch.Tensor) -> dict[str, torch.Tensor]:
    from kvpass.testing.presses import _Recorder

    values: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        _Recorder(program.graph_module, values).run(ids, positions)
    return values


@pytest.mark.parametrize("kind", [*SCALINGS, "partial", "gemma3"])
def test_re_rotation_is_pruning_before_rope(kind: str) -> None:
    """What key_rerotation stores is the kept keys before RoPE, rotated at 0, 1, 2, ...."""
    model = scaled_model(kind)
    compiled = kvpass.compile(model, "key_rerotation(knorm)", 0.5, backend="eager")
    plain = kvpass.compile(model, "knorm", 0.5, backend="eager")
    ids = token_ids(2, 90)
    moved, still = compiled.prefill(ids).past_key_values, plain.prefill(ids).past_key_values
    program = compiled.graph("prefill")
    for site in attention_sites(program):
        assert torch.equal(moved.positions(site.layer), still.positions(site.layer))
        assert torch.equal(moved.values(site.layer), still.values(site.layer))
    assert moved.next_position == 45
    # Rotating back by the same tap gives the keys where they were.
    taps = Taps(program)
    for site in attention_sites(program):
        layer = taps.of_layer(site)
        rope = layer.ropes(program, {n: program.attribute(node) for n, node in layer.constants.items()})["key_rope"]
        width = still.keys(site.layer).shape[-1]
        count = moved.kept(site.layer)
        old = still.positions(site.layer)[:, 0]
        new = torch.arange(count)[None] + (45 - count)
        basis = torch.eye(width)[None, None]
        for row in range(2):
            for slot in (0, 3, count - 1):
                rotation_old, rotation_new = (
                    rope.rotate(basis, rope.frequencies(p.reshape(1, 1)))[0, 0]  # type: ignore[union-attr]
                    for p in (old[row, slot], new[0, slot])
                )
                before = torch.linalg.solve(rotation_old.T, still.keys(site.layer)[row, 0, slot])
                torch.testing.assert_close(
                    rotation_new.T @ before, moved.keys(site.layer)[row, 0, slot], atol=2e-4, rtol=2e-4
                )


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_changing_tables_are_fixed_reported_and_given_back(kind: str) -> None:
    """At the longest length the model is its own eager self; its answers before and after are the same bits."""
    model = scaled_model(kind)
    short, long = token_ids(1, 40), token_ids(1, 256)
    before = [model(ids, use_cache=False).logits for ids in (short, long, short)]
    compiled = kvpass.compile(model, press=None, backend="eager")
    logits = compiled.prefill(long).logits
    torch.testing.assert_close(logits[:, -1], before[1][:, -1], atol=1e-4, rtol=1e-4)
    after = [model(ids, use_cache=False).logits for ids in (short, long, short)]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    assert f"RoPE of type '{kind}' uses its table for texts of 256 tokens" in str(compiled.report())


def test_longrope_compiled_for_short_texts_has_the_short_table() -> None:
    model = scaled_model("longrope")
    ids = token_ids(1, 50)
    compiled = kvpass.compile(model, press=None, backend="eager", max_tokens=64)
    expected = model(ids, use_cache=False).logits[:, -1]
    torch.testing.assert_close(compiled.prefill(ids).logits[:, -1], expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(kvpass.KVPassError, match="the text is 65 tokens long, the model's positions end at 64"):
        compiled.prefill(token_ids(1, 65))
