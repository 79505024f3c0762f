"""What torch.compile makes of the graphs: equal to eager, compiled once for all lengths, the cache never copied."""

import re
import threading

import pytest
import torch
from models import captured_model, eager_model, token_ids
from torch._dynamo.utils import counters
from torch._inductor import cpu_vec_isa
from torch._inductor.utils import run_and_get_code

import kvpass
from kvpass.backends.inductor import RegionalGraph


def pieces(model: kvpass.CompiledModel) -> int:
    """How many pieces of code inductor made for it."""
    runners = [graph.run for graph in model._execution.ready.values()]
    assert all(isinstance(run, RegionalGraph) for run in runners)
    return sum(run.compiled for run in runners if isinstance(run, RegionalGraph))


@pytest.fixture(scope="module")
def models() -> tuple[kvpass.CompiledModel, kvpass.CompiledModel]:
    pair = [kvpass.compile(captured_model("llama"), "snapkv", ratio=0.5, backend=b) for b in ("inductor", "eager")]
    return pair[0], pair[1]


def talk(model: kvpass.CompiledModel, batch: int, tokens: int) -> list[torch.Tensor]:
    """A prompt, 300 generated tokens (the cache grows on the way), a question of 7 tokens."""
    ids = token_ids(batch, tokens, seed=tokens)
    out = model.generate(ids, max_new_tokens=300, min_new_tokens=300, do_sample=False, return_dict_in_generate=True)
    cache = out.past_key_values
    answer = model(input_ids=token_ids(batch, 7, seed=1), past_key_values=cache)
    kept = [cache.positions(layer) for layer in range(len(cache))]
    return [out.sequences, answer.logits, *kept, cache.keys(1), cache.values(1)]


def test_one_compile_serves_all_lengths(models: tuple[kvpass.CompiledModel, kvpass.CompiledModel]) -> None:
    """Three graphs of two pieces for one row, three for several, whatever the lengths; equal to the eager backend."""
    inductor, eager = models
    for batch, tokens, expected_pieces in [(1, 101, 6), (1, 260, 6), (1, 128, 6), (2, 90, 12), (3, 131, 12)]:
        for found, expected in zip(talk(inductor, batch, tokens), talk(eager, batch, tokens), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        assert pieces(inductor) == expected_pieces


def test_generate_and_direct_calls_share_their_graphs() -> None:
    """Token ids are slices in generate and whole tensors in a direct call; neither is compiled twice."""
    torch._dynamo.reset()
    counters.clear()
    model = kvpass.compile(captured_model("llama"), "snapkv", ratio=0.5, backend="aot_eager")
    ids = token_ids(1, 90)
    cache = model.prefill(ids).past_key_values
    model(input_ids=token_ids(1, 9), past_key_values=cache)
    model(input_ids=token_ids(1, 1), past_key_values=cache)
    compiled = counters["stats"]["unique_graphs"]
    cache.rewind()
    longer = torch.cat([ids, token_ids(1, 30, seed=2)], dim=1)
    model.generate(longer, past_key_values=cache, max_new_tokens=5, do_sample=False)
    model.generate(ids, max_new_tokens=5, do_sample=False)
    assert counters["stats"]["unique_graphs"] == compiled


def test_decode_allocates_nothing_of_the_cache_size() -> None:
    """The generated code of a decode step makes no buffer with the cache's capacity and head size."""
    captured = kvpass.capture_model(eager_model("llama"))  # its graphs are nobody else's, and not compiled yet
    model = kvpass.compile(captured, backend="inductor", capacity=1000)
    cache = model.prefill(token_ids(1, 50)).past_key_values
    buffers = [t.data_ptr() for layer in range(2) for t in cache.buffers(layer)]

    def step() -> object:
        return model(input_ids=token_ids(1, 1), past_key_values=cache)

    _, codes = run_and_get_code(step)
    assert len(codes) == 2
    for code in codes:
        assert not re.search(r"extern_kernels\.\w*mm|\.default\(", code)
        cached = set(re.findall(r"assert_size_stride\(\w+, \(1, 2, (\w+), 16\)", code))
        assert cached  # the symbols (or numbers) that stand for the capacity of keys and values
        allocated = [shape.split(", ") for shape in re.findall(r"empty_strided\w*\(\((.*?)\), ", code)]
        assert any(cached & set(shape) for shape in allocated)  # the scores: one number a slot
        assert not [shape for shape in allocated if cached & set(shape) and "16" in shape]
    assert [t.data_ptr() for layer in range(2) for t in cache.buffers(layer)] == buffers


def test_512_steps_compile_one_graph() -> None:
    """The cache grows twice on the way; nothing of a step depends on how much is in it."""
    torch._dynamo.reset()
    counters.clear()
    model = kvpass.compile(captured_model("llama"), "knorm", ratio=0.5, backend="aot_eager")
    model.generate(token_ids(1, 90), max_new_tokens=513, min_new_tokens=513, do_sample=False)
    assert counters["stats"]["unique_graphs"] == 2  # prefill and decode
    assert not counters["graph_break"]


def test_any_backend_of_torch_compile(models: tuple[kvpass.CompiledModel, kvpass.CompiledModel]) -> None:
    """A function serves as a backend, a name and a mode are passed through."""
    seen: list[int] = []

    def backend(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        seen.append(len(list(module.graph.nodes)))
        return module.forward

    ids = token_ids(1, 80)
    expected = models[1].prefill(ids).logits
    custom = kvpass.compile(captured_model("llama"), "snapkv", ratio=0.5, backend=backend)
    torch.testing.assert_close(custom.prefill(ids).logits, expected, atol=1e-4, rtol=1e-4)
    assert len(seen) == 1
    named = kvpass.compile(captured_model("llama"), "snapkv", ratio=0.5, backend="aot_eager")
    torch.testing.assert_close(named.prefill(ids).logits, expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(RuntimeError, match="Unrecognized mode=fastest"):
        kvpass.compile(captured_model("llama"), "snapkv", ratio=0.5, mode="fastest").prefill(ids)


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_modes_write_the_same_text(mode: str) -> None:
    """The default one is compared everywhere else."""
    captured = captured_model("llama")
    model = kvpass.compile(captured, "snapkv(window_size=8)", 0.5, mode=mode)
    eager = kvpass.compile(captured, "snapkv(window_size=8)", 0.5, backend="eager")
    for tokens in (41, 118):
        texts = [m.generate(token_ids(1, tokens), max_new_tokens=8, do_sample=False) for m in (model, eager)]
        assert torch.equal(*texts)


def test_a_budget_as_long_as_the_prompt() -> None:
    """Sizes that are equal by accident are told apart in an order that is possible: kept, read, stored."""
    press = "per_layer(knorm, compression_ratios=(0.0, 0.5))"
    models = [kvpass.compile(captured_model("llama"), press, backend=backend) for backend in ("inductor", "eager")]
    found, expected = (model.prefill(token_ids(1, 90)) for model in models)
    assert [found.past_key_values.kept(layer) for layer in range(2)] == [90, 45]
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=1e-4)


def test_a_token_is_read_without_looking_at_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between growths of the cache nothing is asked of its layers, and no input is looked up again."""
    model = kvpass.compile(captured_model("gemma3_text"), "knorm", ratio=0.5, backend="inductor")
    cache = model.prefill(token_ids(1, 90)).past_key_values
    for _ in range(2):
        model(input_ids=token_ids(1, 1), past_key_values=cache)

    def asked(*arguments: object) -> object:
        raise AssertionError(f"asked for {arguments}")

    for name in ("_entries", "buffers", "_resize"):
        monkeypatch.setattr(kvpass.CompressedCache, name, asked)
    monkeypatch.setattr(RegionalGraph, "_for_shapes", asked)
    for _ in range(20):
        model(input_ids=token_ids(1, 1), past_key_values=cache)
    assert cache.seen_tokens == 112


@pytest.mark.parametrize("backend", ["inductor", "eager"])
def test_the_cpu_is_asked_for_its_instructions_beside_the_capture(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked_by: list[threading.Thread] = []
    monkeypatch.setattr(cpu_vec_isa, "valid_vec_isa_list", lambda: asked_by.append(threading.current_thread()))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    kvpass.compile(captured_model("llama"), backend=backend)
    for thread in threading.enumerate():
        if thread.name == "kvpass-get-ready":
            thread.join()
    assert len(asked_by) == (backend == "inductor") and threading.main_thread() not in asked_by
