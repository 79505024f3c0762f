"""Layers that read the keys of another layer: compressed once, stored once, read by all of them."""

import functools
from pathlib import Path

import pytest
import torch
from models import token_ids
from torch import Tensor

import kvpass
from kvpass.backends.regions import cut_regions
from kvpass.errors import PressError, VerificationError
from kvpass.inspection.findings import findings_of
from kvpass.ir.form import Phase
from kvpass.ir.masks import Causal, Sliding
from kvpass.ir.program import Role
from kvpass.pass_manager import PassManager
from kvpass.passes.insert_kv_cache import InsertKVCache
from kvpass.passes.specialize_phase import SpecializePhase
from kvpass.passes.write_cache_in_place import WriteCacheInPlace

REACH = 16
MASKS = (Sliding(REACH), Causal(), Sliding(REACH), Causal(), Causal())
KEYS_OF = (0, 1, 0, 1, 1)  # the layer that makes the keys of each


class Sharing(torch.nn.Module):
    """Five layers, the last three of which read the keys and values of the first two."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(256, 32)
        self.where = torch.nn.Embedding(512, 32)
        self.q = torch.nn.ModuleList(torch.nn.Linear(32, 32) for _ in MASKS)
        self.kv = torch.nn.ModuleList(torch.nn.Linear(32, 32) for _ in range(2))
        self.out = torch.nn.ModuleList(torch.nn.Linear(32, 32) for _ in MASKS)
        self.head = torch.nn.Linear(32, 256)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x = self.embed(input_ids) + self.where(position_ids)
        number = torch.arange(input_ids.shape[1])
        made = []
        for layer, mask in enumerate(MASKS):
            q = (4 * self.q[layer](x)).unflatten(-1, (4, 8)).transpose(1, 2)
            if KEYS_OF[layer] == layer:
                made.append([t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.kv[layer](x).split(16, dim=-1)])
            k, v = made[KEYS_OF[layer]]
            allowed = mask.allowed(number[:, None], number)
            mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=True)
            x = x + self.out[layer](mixed.transpose(1, 2).flatten(2))
        return self.head(x)  # type: ignore[no-any-return]


@functools.cache
def captured() -> kvpass.CapturedModel:
    return kvpass.capture_model(Sharing(), max_tokens=512)


def sharing(press: str | None = None, backend: str = "eager") -> kvpass.CompiledModel:
    return kvpass.compile(captured(), press, ratio=0.5 if press else None, backend=backend)


def said_at_once(ids: Tensor) -> Tensor:
    with torch.no_grad():
        return Sharing()(ids, torch.arange(ids.shape[1]).expand(ids.shape))  # type: ignore[no-any-return]


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_nothing_dropped_says_what_the_module_says(backend: str) -> None:
    """Prompt, several questions longer and shorter than the window, single tokens; rings turn over several times."""
    model, cache = sharing(backend=backend), None
    ids = token_ids(1, 110)
    parts = ids.split([23, 5, 37, *[1] * 20, 25], dim=1)
    said = []
    for part in parts:
        left = model(input_ids=part, past_key_values=cache)
        cache = left.past_key_values
        said.append(left.logits)
    expected = said_at_once(ids)[:, 22:]
    torch.testing.assert_close(torch.cat(said, dim=1), expected, atol=1e-4, rtol=1e-4)


def test_keys_are_stored_and_compressed_once() -> None:
    model = sharing("snapkv(window_size=4)")
    cache = model.prefill(token_ids(2, 60)).past_key_values
    assert [len(cache._buffers[layer]) for layer in range(5)] == [2, 2, 0, 0, 0]
    assert cache.nbytes == sum(t.nbytes for layer in (0, 1) for t in cache.buffers(layer))
    assert [cache.kept(layer) for layer in range(5)] == [16, 30, 16, 30, 30]
    for layer in (3, 4):
        assert torch.equal(cache.positions(layer), cache.positions(1))
        assert cache.keys(layer).data_ptr() == cache.keys(1).data_ptr()
    for phase in Phase:
        inputs = [port.name for port in model.graph(phase).inputs if port.layer is not None]
        assert [name for name in inputs if name.startswith("keys")] == ["keys_0", "keys_1"]
    scored = [node.name for node in model.graph("prefill").graph.nodes if node.name.startswith("scores")]
    assert scored == ["scores_1"]


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_every_layer_sees_what_the_first_one_kept(backend: str) -> None:
    """The module itself with a mask that hides the dropped pairs from the tokens behind the prompt."""
    model, ids = sharing("knorm", backend), token_ids(1, 60 + 5 + 4)
    cache = model.prefill(ids[:, :60]).past_key_values
    hidden = torch.ones(2, 60, dtype=torch.bool)
    hidden.scatter_(1, cache.positions(1)[0], value=False)
    said = [model(input_ids=p, past_key_values=cache).logits for p in ids[:, 60:].split([5, 1, 1, 1, 1], dim=1)]

    attend = torch.nn.functional.scaled_dot_product_attention

    def without(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor, enable_gqa: bool) -> Tensor:
        per_head = attn_mask.expand(4, -1, -1).clone()
        if bool(attn_mask[-1, 0]):  # a full layer
            per_head[:, 60:, :60] &= ~hidden.repeat_interleave(2, dim=0)[:, None]
        return attend(q, k, v, attn_mask=per_head, enable_gqa=enable_gqa)

    torch.nn.functional.scaled_dot_product_attention = without  # type: ignore[assignment]
    try:
        expected = said_at_once(ids)
    finally:
        torch.nn.functional.scaled_dot_product_attention = attend
    torch.testing.assert_close(torch.cat(said, dim=1), expected[:, 60:], atol=1e-4, rtol=1e-4)
    assert (expected - said_at_once(ids))[:, 60:].abs().max() > 0.01


def test_going_back_copying_and_files(tmp_path: Path) -> None:
    model, question = sharing("knorm"), token_ids(2, 21, seed=1)
    cache = model.prefill(token_ids(2, 60)).past_key_values
    cache.save(tmp_path / "cache.safetensors")
    expected = model(input_ids=question, past_key_values=cache).logits
    for again in (
        cache.rewind(),
        kvpass.CompressedCache.load(tmp_path / "cache.safetensors"),
        cache.copy().rewind(),
    ):
        torch.testing.assert_close(model(input_ids=question, past_key_values=again).logits, expected)


def test_a_region_reads_the_cache_that_another_one_wrote() -> None:
    """And not a result of that region, which would be a copy."""
    program = sharing().graph(Phase.DECODE)
    regions = cut_regions(program).regions
    writers = [i for i, region in enumerate(regions) if "index_put_" in str(region.graph)]
    readers = [i for i, region in enumerate(regions) if program.input_node(Role.KEYS, 1) in region.reads]
    assert len(readers) > len(writers[1:]) == 1
    assert not [leaf.name for region in regions for leaf in region.leaves if "_out" in leaf.name]


def test_layers_without_keys_of_their_own_cannot_be_chosen() -> None:
    with pytest.raises(PressError, match=r"layers=\[3\] read the keys of layers \[1\]"):
        kvpass.compile(captured(), "knorm", ratio=0.5, layers=[1, 3])
    model = kvpass.compile(captured(), "knorm", ratio=0.5, layers=lambda layer: layer > 0, backend="eager")
    assert model.prefill(token_ids(1, 60)).past_key_values.kept(4) == 30


def test_inspection_says_whose_keys_a_layer_reads() -> None:
    layers = findings_of(captured().graphs.located).layers
    assert [layer.extras[-1:] for layer in layers[2:]] == [("keys of layer 0",), *[("keys of layer 1",)] * 2]
    assert [layer.pressable for layer in layers] == [False, True, False, False, False]


def test_a_cache_that_is_read_behind_its_overwriting_is_an_error() -> None:
    """In place, that reader would see the new one."""
    program = PassManager((SpecializePhase(Phase.DECODE), InsertKVCache())).run(captured().graphs.located)
    updated = next(node for node in program.graph.nodes if node.name == "keys_out_1")
    reader = next(user for user in updated.users if user.op == "call_function")
    reader.replace_input_with(updated, updated.args[0])
    with pytest.raises(VerificationError, match=f"{reader.name} reads keys_1 behind keys_out_1"):
        PassManager((WriteCacheInPlace(),)).run(program)
