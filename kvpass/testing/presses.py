"""Run a press on plain tensors, and compare that with what is inlined into a graph."""

from collections.abc import Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor

from kvpass.api import CapturedModel
from kvpass.budget import Budget, Prompt
from kvpass.ir.attention_site import AttentionSite, attention_sites
from kvpass.ir.form import Phase
from kvpass.ir.program import KVProgram, Role
from kvpass.ir.taps import Taps
from kvpass.pass_manager import PassManager
from kvpass.passes.insert_kv_cache import InsertKVCache
from kvpass.passes.specialize_phase import SpecializePhase
from kvpass.passes.splice_press import SplicePress
from kvpass.press import Compressed, ModelFacts, Press
from kvpass.press_inputs import Frequencies, PressInputs


class PlainRope:
    """Rotate-half RoPE with base 10000, for presses that run on plain tensors."""

    def frequencies(self, positions: Tensor, width: int = 16) -> Frequencies:
        inverse = 10000.0 ** (-torch.arange(0, width, 2) / width)
        angles = positions[:, None, :, None] * torch.cat([inverse, inverse])
        return angles.cos(), angles.sin()

    def average(self, frequencies: Frequencies) -> Frequencies:
        return tuple(t.mean(dim=-2, keepdim=True) for t in frequencies)

    def rotate(self, states: Tensor, frequencies: Frequencies) -> Tensor:
        first, second = states.chunk(2, dim=-1)
        cos, sin = (t.to(states.dtype) for t in frequencies)
        return states * cos + torch.cat([-second, first], dim=-1) * sin


FACTS = ModelFacts(name="", layers=4, heads=4, kv_heads=2, key_size=16, hidden_size=64)


def random_inputs(
    tokens: int,
    budget: int | Budget,
    *,
    press: Press | None = None,
    seed: int = 0,
    batch: int = 2,
    layer: int = 0,
    dtype: torch.dtype = torch.float32,
) -> PressInputs:
    """All fields of `PressInputs` with normal random tensors: 4 query heads, 2 KV heads, head size 16.

    budget: the pairs to keep, or what `kvpass.compile` takes. press: whose sizes, scalars and assets are given too.
    """
    generator = torch.Generator().manual_seed(seed)
    heads = {"queries_pre_rope": 4, "keys_pre_rope": 2, "values": 2}
    taps = {name: torch.randn(batch, count, tokens, 16, generator=generator) for name, count in heads.items()}
    rope = PlainRope()
    frequencies = rope.frequencies(torch.arange(tokens)[None])
    taps["queries"] = rope.rotate(taps["queries_pre_rope"], frequencies)
    taps["keys"] = rope.rotate(taps["keys_pre_rope"], frequencies)
    taps["hidden_states"] = torch.randn(batch, tokens, 64, generator=generator)
    taps["output_weight"] = torch.randn(64, 64, generator=generator) / 8
    budget = Budget(target_size=budget) if isinstance(budget, int) else budget
    prompt = Prompt(tokens, budget, layer, FACTS.layers, question=min(8, tokens - 1))
    sizes, scalars = {"budget": prompt.kept}, {}
    if press is not None:
        sizes, scalars = press.sizes(prompt), press.scalars(prompt)
        taps |= {f"asset.{name}": tensor[layer] for name, tensor in press.assets(FACTS).items()}
    return PressInputs(
        {name: tensor.to(dtype) for name, tensor in taps.items()},
        rope=rope,
        key_rope=rope,
        sizes=sizes,
        scalars={name: torch.tensor(value) for name, value in scalars.items()},
        layer=layer,
        layers=FACTS.layers,
    )


def check_press(press: Press, model: CapturedModel, lengths: Sequence[int] = (70, 131)) -> list[list[Compressed]]:
    """Assert that what the graph keeps is what `press.compress` keeps of the same tensors, layer by layer.

    model: from `kvpass.capture_model`; lengths: prompt lengths to try, none of them the example's, so that a size
    that was frozen shows. Returns what is left by length and layer.
    """
    located = model.graphs.located
    programs: dict[Press, KVProgram] = {}
    found = []
    for length in lengths:
        tokens = max(length, press.min_tokens)
        prompt = Prompt(tokens, Budget(0.6), 0, located.layer_count, question=min(8, tokens - 1))
        chosen = press.for_prompt(prompt)
        if chosen not in programs:
            cut = SpecializePhase(Phase.PREFILL, chosen.min_tokens, chosen.example_tokens)
            programs[chosen] = PassManager((cut, InsertKVCache(), SplicePress(chosen))).run(located)
        found.append(_compare(programs[chosen], chosen, prompt))
    return found


def _compare(program: KVProgram, press: Press, prompt: Prompt) -> list[Compressed]:
    """Run the graph up to what the press leaves, and the press on what the graph computed for its taps."""
    taps, found = Taps(program), []
    values = _run(program, press, prompt)
    for site in attention_sites(program):
        if not site.pressable:
            continue
        eager = press.compress(_inputs(program, press, replace(prompt, layer=site.layer), taps, site, values))
        inlined = {role: values[name] for role, name in site.node.meta["press"].items()}
        named = {"keys": "keys_kept", "values": "values_kept"}
        for field in fields(eager):
            expected = getattr(eager, field.name)
            assert (expected is None) == (named.get(field.name, field.name) not in inlined)
            if expected is not None:
                actual = inlined[named.get(field.name, field.name)]
                torch.testing.assert_close(actual, expected)
        found.append(eager)
    return found


def _inputs(
    program: KVProgram, press: Press, prompt: Prompt, taps: Taps, site: AttentionSite, values: dict[str, Tensor]
) -> PressInputs:
    layer = taps.of_layer(site)
    given = layer.values({name: values[node.name] for name, node in layer.nodes.items()})
    for node in program.graph.nodes:
        if (
            node.op == "get_attr"
            and str(node.target).startswith("press_")
            and str(node.target).endswith(f"_{site.layer}")
        ):
            name = str(node.target).removeprefix("press_").removesuffix(f"_{site.layer}")
            given[f"asset.{name}"] = program.attribute(node)
    ropes = layer.ropes(program, {name: program.attribute(node) for name, node in layer.constants.items()})
    return PressInputs(
        given,
        rope=ropes["rope"],
        key_rope=ropes["key_rope"],
        sizes=press.sizes(prompt),
        scalars={name: torch.tensor(value) for name, value in press.scalars(prompt).items()},
        scale=site.scale,
        layer=site.layer,
        layers=program.layer_count,
    )


def _run(program: KVProgram, press: Press, prompt: Prompt) -> dict[str, Tensor]:
    """Every tensor that the graph computes for random tokens, by node name."""
    ids = torch.randint(3, 50, (2, prompt.tokens), generator=torch.Generator().manual_seed(prompt.tokens))
    inputs: dict[str, Tensor] = {}
    for port, node in zip(program.inputs, program.placeholders(), strict=True):
        shape = [size if isinstance(size, int) else 0 for size in node.meta["val"].shape]
        here = replace(prompt, layer=port.layer or 0)
        match port.role:
            case Role.INPUT_IDS:
                inputs[node.name] = ids
            case Role.POSITION_IDS:
                inputs[node.name] = torch.arange(prompt.tokens).repeat(2, 1)
            case Role.SIZE:
                inputs[node.name] = torch.empty(press.sizes(here)[port.key])
            case Role.SCALAR:
                inputs[node.name] = torch.tensor(press.scalars(here)[port.key])
            case _:
                slots = prompt.tokens + 8
                inputs[node.name] = torch.zeros(2, shape[1], slots, shape[3], dtype=node.meta["val"].dtype)
    values: dict[str, Tensor] = {}
    interpreter = _Recorder(program.graph_module, values)
    with torch.no_grad():
        interpreter.run(*inputs.values())
    return values


class _Recorder(torch.fx.Interpreter):
    """Keeps what every node computes."""

    def __init__(self, module: torch.fx.GraphModule, values: dict[str, Tensor]) -> None:
        super().__init__(module, garbage_collect_values=False)
        self._values = values

    def run_node(self, n: torch.fx.Node) -> object:
        result: object = super().run_node(n)
        if isinstance(result, Tensor):
            self._values[n.name] = result
        return result
