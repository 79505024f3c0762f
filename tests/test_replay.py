"""A decode step as kernel calls that are noted once and repeated."""

import threading
from dataclasses import replace

import pytest
import torch
from models import eager_model, token_ids
from tiny_models import tiny_model
from torch import Tensor

import kvpass
from kvpass.backends.inductor import RegionalGraph
from kvpass.backends.replay import Buffers, Code, code_of
from kvpass.ir.form import Phase
from kvpass.runtime.cache import CompressedCache


@pytest.fixture(scope="module", params=["llama", "gemma3_text"])
def model(request: pytest.FixtureRequest) -> kvpass.CompiledModel:
    return kvpass.compile(eager_model(request.param), "snapkv(window_size=8)", 0.5, max_tokens=600)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps that were recorded, as how many kernels each calls."""
    steps: list[int] = []
    record = RegionalGraph.record

    def noted(self: RegionalGraph, inputs: list[Tensor]) -> object:
        step = record(self, inputs)
        steps.append(len(step.calls) if step else 0)
        return step

    monkeypatch.setattr(RegionalGraph, "record", noted)
    return steps


def tokens_of(model: kvpass.CompiledModel, cache: CompressedCache, count: int, seed: int = 0) -> Tensor:
    """Logits of single tokens, one after the other."""
    ids = token_ids(1, count, seed)
    return torch.cat([model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(count)], dim=1)


def without_replay(model: kvpass.CompiledModel, cache: CompressedCache, count: int, seed: int = 0) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RegionalGraph, "record", lambda self, inputs: None)
        return tokens_of(model, cache, count, seed)


def test_steps_are_the_same_to_the_bit(model: kvpass.CompiledModel, recorded: list[int]) -> None:
    """Also where the cache grows on the way, and what is written to it."""
    cache = model.prefill(token_ids(1, 90)).past_key_values
    twin = cache.copy()
    found, expected = tokens_of(model, cache, 300), without_replay(model, twin, 300)
    assert torch.equal(found, expected)
    assert len(set(found.argmax(-1).flatten().tolist())) > 1
    for layer in range(len(cache)):
        assert torch.equal(cache.keys(layer), twin.keys(layer))
        assert torch.equal(cache.positions(layer), twin.positions(layer))
    assert 0 not in recorded
    assert 2 <= len(recorded) <= 8  # once, and once when storage has moved


def test_a_step_is_recorded_once(
    model: kvpass.CompiledModel, recorded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """512 tokens into room that is there: nothing of what inductor wrote in Python runs again."""
    cache = model.prefill(token_ids(1, 80)).past_key_values
    cache.reserve(513)
    tokens_of(model, cache, 1)
    monkeypatch.setattr(RegionalGraph, "__call__", lambda *_: pytest.fail("ran region by region"))
    tokens_of(model, cache, 512)
    assert len(recorded) == 1 and recorded[0] > 0


def test_what_was_given_out_stays(model: kvpass.CompiledModel) -> None:
    """Logits are no buffer that the next step writes to."""
    cache = model.prefill(token_ids(1, 60)).past_key_values
    kept = [model(token_ids(1, 1, seed), past_key_values=cache).logits for seed in range(3)]
    copies = [logits.clone() for logits in kept]
    tokens_of(model, cache, 3, seed=7)
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))
    assert not torch.equal(kept[0], kept[1])


def test_caches_in_turns_and_in_threads(model: kvpass.CompiledModel) -> None:
    """What is recorded belongs to a cache: another one, a copy and a rewound one have their own."""
    caches = [model.prefill(token_ids(1, n, seed=n)).past_key_values for n in (50, 71)]
    expected = [without_replay(model, cache.copy(), 40, seed=3) for cache in caches]
    found: dict[int, Tensor] = {}

    def run(i: int) -> None:
        found[i] = tokens_of(model, caches[i], 40, seed=3)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], expected[i]) for i in range(2))
    caches[0].rewind()
    assert torch.equal(tokens_of(model, caches[0], 40, seed=3), expected[0])


def test_from_inference_mode_to_none(model: kvpass.CompiledModel) -> None:
    cache = model.prefill(token_ids(1, 60)).past_key_values
    twin = cache.copy()
    with torch.inference_mode():
        first = tokens_of(model, cache, 2)
    later = tokens_of(model, cache, 2, seed=1)
    assert torch.equal(first, without_replay(model, twin, 2))
    assert torch.equal(later, without_replay(model, twin, 2, seed=1))


def test_the_storage_that_was_left_is_free(model: kvpass.CompiledModel) -> None:
    """A recorded step does not keep the memory that a cache has grown out of."""
    cache = model.prefill(token_ids(1, 90)).past_key_values
    tokens_of(model, cache, 1)
    assert cache.step is not None
    cache.reserve(300)
    assert cache.step is None and cache.copy().step is None


def test_buffers_are_those_of_two_layers() -> None:
    """However many layers run the same code; and no layer writes to what is still read."""
    model = kvpass.compile(tiny_model("llama", num_hidden_layers=6), "knorm", 0.5, max_tokens=300)
    cache = model.prefill(token_ids(1, 40)).past_key_values
    expected = without_replay(model, cache.copy(), 5)
    assert torch.equal(tokens_of(model, cache, 5), expected)
    assert cache.step is not None
    outside = {t.untyped_storage().data_ptr() for held in cache._buffers for t in held}
    outside |= {t.untyped_storage().data_ptr() for t in model.parameters()}

    def held(first: int, count: int = 2) -> set[int]:
        """The buffers of some layers."""
        assert cache.step is not None
        calls = cache.step.calls[first : first + count]
        return {t.untyped_storage().data_ptr() for _, args in calls for t in args if isinstance(t, Tensor)} - outside

    assert len(cache.step.calls) == 8  # what comes before the layers, and the head
    assert held(2) == held(4)
    assert len(held(2)) > len(held(2, 1)) > 10

    graph = model._execution.phase(Phase.DECODE, one_row=True).run
    assert isinstance(graph, RegionalGraph)
    (ready,) = graph._ready.values()
    assert all(graph._read_by_the_next(ready.pieces))
    *others, last = graph.cut.regions
    far = replace(last, reads=(*last.reads, others[2].leaves[0]))  # as if the head read what an early layer leaves
    graph.cut = replace(graph.cut, regions=(*others, far))
    assert graph._read_by_the_next(ready.pieces) == [i != 2 for i in range(len(ready.pieces))]


def test_memory_in_turns() -> None:
    buffers, one, other = Buffers(), object(), object()

    def places(piece: object, *, apart: bool = False) -> list[int]:
        allocate = buffers.of(piece, apart=apart)
        return [allocate((2, 3), (3, 1), torch.float32).data_ptr() for _ in range(2)]

    runs = [places(one), places(one), places(other), places(one), places(one, apart=True), places(one), places(one)]
    assert runs[3] == runs[0] == runs[5] and runs[6] == runs[1]
    assert len({place for run in runs for place in run}) == 8


def test_a_step_is_of_one_graph() -> None:
    """The model compiled once more goes on with a cache by its own code."""
    models = [kvpass.compile(kvpass.capture_model(tiny_model("llama")), "knorm", 0.5) for _ in range(2)]
    cache = models[0].prefill(token_ids(1, 60)).past_key_values
    twin = cache.copy()
    for turn in range(4):
        model = models[turn % 2]
        assert torch.equal(tokens_of(model, cache, 2, seed=turn), without_replay(model, twin, 2, seed=turn))
        assert cache.step is not None
        assert cache.step.graph is model._execution.phase(Phase.DECODE, one_row=True).run


def test_what_cannot_be_replayed(recorded: list[int]) -> None:
    """Several rows are multiplied by a library, not by kernels that inductor wrote."""
    model = kvpass.compile(eager_model("llama"), "snapkv(window_size=8)", 0.5, max_tokens=600)
    cache = model.prefill(token_ids(2, 60)).past_key_values
    model(token_ids(2, 1), past_key_values=cache)
    assert not recorded and cache.step is None


def test_only_kernels_are_found_replayable() -> None:
    x = torch.randn(8, 8)

    def compiled(function: object) -> Code | None:
        graph = torch.fx.symbolic_trace(function)  # type: ignore[arg-type]
        with torch.no_grad():
            return code_of(torch._inductor.compile(graph, [x]))

    code = compiled(lambda x: (x * 2).sum(dim=1))
    assert code is not None and len(code.kernels) == 1
    assert compiled(lambda x: torch.linalg.qr(x * 2)[0]) is None  # a call of a library
    assert compiled(lambda x: torch.mm(x, x) * 2) is None
    assert code_of(lambda x: x) is None
