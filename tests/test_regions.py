"""A graph in pieces: equal layers are one piece of code, and together they compute what the whole graph does."""

from collections.abc import Sequence

import pytest
import torch
from models import captured_model, token_ids
from torch import SymInt, Tensor
from torch.fx import GraphModule
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

import kvpass
from kvpass.backends import make_runner
from kvpass.backends.inductor import RegionalGraph
from kvpass.backends.onednn import multiply_with_onednn
from kvpass.backends.regions import can_cut, cut_regions
from kvpass.backends.torch_compile import CompiledGraph
from kvpass.ir.form import Phase
from kvpass.ir.program import KVProgram
from kvpass.pass_manager import PassManager
from kvpass.pipeline import phase_passes
from kvpass.presses import SnapKV

SMALL = dict(
    vocab_size=256,
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=512,
)


@pytest.fixture(scope="module")
def llamas() -> list[kvpass.CapturedModel]:
    """Of 4 and of 7 layers."""
    models = [LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **SMALL)).eval() for layers in (4, 7)]
    return [kvpass.capture_model(model) for model in models]


def lowered(captured: kvpass.CapturedModel, phase: Phase, press: kvpass.Press | None = None) -> KVProgram:
    return PassManager(phase_passes(phase, press)).run(captured.graphs.located)


@pytest.mark.parametrize(
    ("phase", "press"), [(Phase.PREFILL, SnapKV(window_size=8)), (Phase.EXTEND, None), (Phase.DECODE, None)]
)
def test_equal_layers_are_one_text(
    llamas: list[kvpass.CapturedModel], phase: Phase, press: kvpass.Press | None
) -> None:
    """Whatever their number, there are three texts: what stands before the layers, a layer, what stands behind.

    In a prompt that is all of the last layer, which is narrowed.
    """
    for captured, layers in zip(llamas, (4, 7), strict=True):
        program = lowered(captured, phase, press)
        regions = cut_regions(program).regions
        alike = layers - 1 if phase is Phase.PREFILL else layers
        assert len(regions) == alike + 2
        assert len({region.text for region in regions[1:-1]}) == 1
        assert len({region.text for region in regions}) == 3
        assert len({id(region.graph) for region in regions}) == 3, "equal graphs are kept once"
        # states go to the next layer, and out of the graph the positions of what was kept
        assert [len(region.leaves) for region in regions[1:-1]] == [2 if press else 1] * alike
        # from one layer to the next go the states, and what all layers read of positions
        given = [{leaf.name for leaf in region.leaves} for region in regions]
        read = [{node.name for node in region.reads if node.op == "call_function"} for region in regions]
        assert len(read[2] & given[1]) == 1
        assert read[2] & given[0] == read[3] & given[0]


def test_weights_are_cast_where_they_are_read() -> None:
    """In bfloat16 no region leaves a cast weight to the next: it would be written to memory, in float32."""
    config = LlamaConfig(num_hidden_layers=4, dtype=torch.bfloat16, **SMALL)
    captured = kvpass.capture_model(LlamaForCausalLM(config).eval().to(torch.bfloat16))
    program = PassManager(phase_passes(Phase.DECODE, None, one_row=True)).run(captured.graphs.located)
    regions = cut_regions(program).regions
    assert len(regions) == 6 and len({region.text for region in regions}) == 3
    assert all(leaf.meta["val"].numel() <= SMALL["vocab_size"] for region in regions for leaf in region.leaves)
    weights = [node for region in regions for node in region.reads if node.op == "get_attr"]
    assert {program.attribute(node).dtype for node in weights} == {torch.bfloat16}


def test_layers_of_two_kinds() -> None:
    """Gemma 3 with a layer of full attention among sliding ones: one text more."""
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
    config = Gemma3TextConfig(num_hidden_layers=5, layer_types=kinds, sliding_window=16, **SMALL)
    program = lowered(kvpass.capture_model(Gemma3ForCausalLM(config).eval()), Phase.DECODE)
    texts = [region.text for region in cut_regions(program).regions]
    assert len(set(texts)) == 4
    assert texts.count(texts[1]) == 4


def as_they_are(module: GraphModule, inputs: Sequence[object], options: object) -> GraphModule:
    """In the place of inductor."""
    return module


@pytest.mark.parametrize("arch", ["llama", "gemma3_text"])
@pytest.mark.parametrize("batch", [1, 2])
def test_pieces_compute_what_the_whole_does(arch: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt, generated tokens, a question."""
    monkeypatch.setattr(torch._inductor, "compile", as_they_are)
    found = []
    # a mode of its own, so that these runners are nobody else's
    for options in ({"backend": "eager"}, {"backend": "inductor", "mode": "default"}):
        model = kvpass.compile(captured_model(arch), SnapKV(window_size=8), ratio=0.5, **options)
        out = model.generate(
            token_ids(batch, 60), max_new_tokens=20, min_new_tokens=20, do_sample=False, return_dict_in_generate=True
        )
        answer = model(input_ids=token_ids(batch, 7, seed=1), past_key_values=out.past_key_values)
        found.append([out.sequences, answer.logits, out.past_key_values.keys(1), out.past_key_values.values(0)])
    assert [type(graph.run) for graph in model._execution.ready.values()] == [RegionalGraph] * 3
    for expected, pieced in zip(*found, strict=True):
        torch.testing.assert_close(pieced, expected, atol=1e-4, rtol=1e-4)


def test_code_runs_with_the_sizes_it_was_made_for(
    llamas: list[kvpass.CapturedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a compilation assumed of a size is a guard; where it fails, code is made anew."""

    def assuming(module: GraphModule, inputs: Sequence[object], options: object) -> GraphModule:
        short = [bool(size < 100) for size in inputs if isinstance(size, SymInt)]
        assert short
        return module

    monkeypatch.setattr(torch._inductor, "compile", assuming)
    run = RegionalGraph(lowered(llamas[0], Phase.PREFILL), {})
    for tokens, compiled in ((50, 3), (60, 3), (200, 6), (99, 6), (300, 6)):
        cache = [torch.zeros(2, 2, 300, 8) for _ in range(8)]
        with torch.no_grad():
            (logits, *_) = run(token_ids(2, tokens), torch.arange(tokens).repeat(2, 1), *cache)
        assert logits.shape == (2, 1, 256)
        assert cache[7].count_nonzero() == 2 * 2 * tokens * 8
        assert run.compiled == compiled


def test_a_size_that_is_1_inside(llamas: list[kvpass.CapturedModel]) -> None:
    """Behind 4 sinks 5 tokens leave one, which is a constant to a compiler; 41 do not."""
    press = "expected_attention(n_sink=4)"
    expected, found = (kvpass.compile(llamas[0], press, 0.5, backend=backend) for backend in ("eager", "inductor"))
    for tokens in (5, 41, 5):
        ids = token_ids(2, tokens)
        torch.testing.assert_close(found.prefill(ids).logits, expected.prefill(ids).logits)


def test_sizes_that_only_data_tell() -> None:
    """Are left to torch.compile, as other backends are."""
    program = lowered(captured_model("llama"), Phase.DECODE)
    assert can_cut(program)
    node = next(node for node in program.graph.nodes if node.target is torch.ops.aten.linear.default)
    with program.shapes.computing():
        node.meta["val"] = torch.empty(program.shapes.shape_env.create_unbacked_symint())
    assert not can_cut(program)
    assert isinstance(make_runner(program, "inductor", None), CompiledGraph)
    assert isinstance(make_runner(program, "aot_eager", None), CompiledGraph)


def test_onednn_multiplies_the_same() -> None:
    class Linears(torch.nn.Module):
        def forward(self, states: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            aten = torch.ops.aten
            return aten.linear.default(aten.linear.default(states, weight), weight, bias)

    module = torch.fx.symbolic_trace(Linears())
    given = torch.randn(2, 5, 16), torch.randn(16, 16), torch.randn(16)
    expected = module(*given)
    linears = [node for node in module.graph.nodes if node.op == "call_function"]
    for node in linears:
        node.meta["dtype"] = torch.bfloat16
    assert multiply_with_onednn(module.graph) == 0
    for node in linears:
        node.meta["dtype"] = torch.float32
    found = multiply_with_onednn(module.graph)
    module.recompile()
    assert found == (2 if torch.backends.mkldnn.is_available() else 0)
    torch.testing.assert_close(module(*given), expected, atol=1e-4, rtol=1e-4)
