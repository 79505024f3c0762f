"""What each press adds to a graph, compiled by inductor: it computes the same, at lengths it was not compiled for."""

import re

import pytest
import torch
from catalogue import press_by_name
from models import captured_model, token_ids
from torch.fx import Graph, GraphModule

import kvpass
from kvpass.budget import Budget, Prompt
from kvpass.ir.attention_site import attention_sites
from kvpass.ir.form import Phase
from kvpass.ir.program import KVProgram, Role
from kvpass.ir.subgraph import Subgraph
from kvpass.ir.taps import Taps
from kvpass.pass_manager import PassManager
from kvpass.passes.insert_kv_cache import InsertKVCache
from kvpass.passes.specialize_phase import SpecializePhase
from kvpass.passes.splice_press import SplicePress

OURS = sorted(name for name, cls in kvpass.registered_presses().items() if cls.__module__.startswith("kvpass."))
LENGTHS = (90, 113, 74)
GRAPHS = {"chunk": 2}  # a rest that is too short for the inner press is kept whole: another graph


def press_alone(program: KVProgram) -> GraphModule:
    """The nodes of one layer's press as a module: token ids, taps and counts in, what is kept out."""
    site = attention_sites(program)[1]
    taps = Taps(program).of_layer(site).nodes
    inputs = [program.input_node(Role.INPUT_IDS)]
    inputs += [node for name, node in taps.items() if name != "output_weight"]
    inputs += [node for port, node in zip(program.inputs, program.placeholders(), strict=True) if port.key]
    inputs = list(dict.fromkeys(inputs))
    nodes = {node.name: node for node in program.graph.nodes}
    outputs = [nodes[name] for name in site.node.meta["press"].values()]
    piece = Subgraph(tuple(inputs), tuple(outputs))
    graph = Graph()
    placed = {node: graph.placeholder(node.name) for node in inputs}
    for node, new in placed.items():
        new.meta["val"] = node.meta["val"]
    for leaf in piece.leaves():
        placed[leaf] = graph.get_attr(str(leaf.target))
    for node in piece.body:
        placed[node] = graph.node_copy(node, placed.__getitem__)
    graph.output(tuple(placed[node] for node in outputs))
    return GraphModule(program.graph_module, graph)


@pytest.mark.parametrize("name", OURS)
def test_inductor_computes_what_the_graph_says(name: str) -> None:
    located = captured_model("llama").graphs.located
    press = press_by_name(name, located.layer_count)
    torch._dynamo.reset()
    compiled: dict[object, tuple[GraphModule, object]] = {}
    for tokens in LENGTHS:
        prompt = Prompt(tokens, Budget(0.5), 1, located.layer_count, question=8)
        chosen = press.for_prompt(prompt)
        if chosen not in compiled:
            cut = SpecializePhase(Phase.PREFILL, chosen.min_tokens, chosen.example_tokens)
            module = press_alone(PassManager((cut, InsertKVCache(), SplicePress(chosen))).run(located))
            compiled[chosen] = module, torch.compile(module, fullgraph=True)
        module, fast = compiled[chosen]
        generator = torch.Generator().manual_seed(tokens)
        given = []
        for node in (n for n in module.graph.nodes if n.op == "placeholder"):
            given.append(_value(node.name, chosen, prompt, generator))
            symbolic = [axis for axis, size in enumerate(node.meta["val"].shape) if isinstance(size, torch.SymInt)]
            if symbolic:
                torch._dynamo.maybe_mark_dynamic(given[-1], symbolic)
        for found, expected in zip(fast(*given), module(*given), strict=True):  # type: ignore[operator]
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert len(compiled) == GRAPHS.get(name, 1)


def _value(name: str, press: kvpass.Press, prompt: Prompt, generator: torch.Generator) -> torch.Tensor:
    """Random numbers for a tap, the host's count for a size or a scalar."""
    located = captured_model("llama").graphs.located
    key = re.sub(r"_\d+$", "", name)  # of any layer
    if key in press.sizes(prompt):
        return torch.empty(press.sizes(prompt)[key])
    if key in press.scalars(prompt):
        return torch.tensor(press.scalars(prompt)[key])
    if name == "input_ids":
        return token_ids(2, prompt.tokens)
    node = next(node for node in located.graph.nodes if node.name == name)
    shape = [{"B": 2, "S": prompt.tokens}.get(located.shapes.text(size), size) for size in node.meta["val"].shape]
    return torch.randn([int(size) for size in shape], generator=generator)
