"""Run a press on plain tensors, and compare that with what is inlined into a graph."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvpass.api import CapturedModel
from kvpass.errors import MissingTapError
from kvpass.ir.attention_site import attention_sites
from kvpass.ir.form import Phase
from kvpass.ir.program import KVProgram, Role
from kvpass.ir.rotary import GraphRope
from kvpass.ir.taps import TAP_NAMES, Taps
from kvpass.pass_manager import PassManager
from kvpass.passes.insert_kv_cache import InsertKVCache
from kvpass.passes.specialize_phase import SpecializePhase
from kvpass.passes.splice_score import SpliceScore
from kvpass.press import Frequencies, Press, PressInputs


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
        return states * frequencies[0] + torch.cat([-second, first], dim=-1) * frequencies[1]


def random_inputs(tokens: int, budget: int, *, seed: int = 0, batch: int = 2, layer: int = 0) -> PressInputs:
    """All fields of `PressInputs` with normal random tensors: 4 query heads, 2 KV heads, head size 16."""
    generator = torch.Generator().manual_seed(seed)
    heads = {"queries": 4, "queries_pre_rope": 4, "keys": 2, "keys_pre_rope": 2, "values": 2}
    taps = {name: torch.randn(batch, count, tokens, 16, generator=generator) for name, count in heads.items()}
    taps["hidden_states"] = torch.randn(batch, tokens, 64, generator=generator)
    return PressInputs(taps, rope=PlainRope(), budget=torch.empty(budget), layer=layer, layers=layer + 1)


def check_press(press: Press, model: CapturedModel, lengths: Sequence[int] = (70, 131)) -> list[list[Tensor]]:
    """Assert that the scores in the graph are those of `press.score` on the same tensors, layer by layer.

    model: from `kvpass.capture_model`; lengths: prompt lengths to try, none of them the example's, so that a size
    that was frozen shows. Returns the scores by length and layer, [B, Hkv, S] each.
    """
    steps = (SpecializePhase(Phase.PREFILL, press.min_tokens), InsertKVCache(), SpliceScore(press))
    program = PassManager(steps).run(model.graphs.located)
    return [_compare(program, press, max(length, press.min_tokens)) for length in lengths]


def _compare(program: KVProgram, press: Press, tokens: int) -> list[Tensor]:
    """Run the graph up to the scores, and the press on what the graph computed for its taps."""
    taps, found = Taps(program), []
    budget = torch.empty(max(1, tokens // 3))
    values = _run(program, tokens, budget)
    for site in attention_sites(program):
        if not site.pressable:
            continue
        given: dict[str, Tensor | MissingTapError] = {}
        for name in TAP_NAMES:
            try:
                given[name] = values[taps.node(site, name).name]
            except MissingTapError as error:
                given[name] = error
        rotation = taps.rotation(site, site.queries)
        rope = GraphRope(program, rotation, {node: program.attribute(node) for node in rotation.constants})
        x = PressInputs(given, rope=rope, budget=budget, scale=site.scale, layer=site.layer, layers=program.layer_count)
        inlined, eager = values[f"scores_{site.layer}"], press.score(x)
        torch.testing.assert_close(inlined, eager)
        found.append(inlined)
    return found


def _run(program: KVProgram, tokens: int, budget: Tensor) -> dict[str, Tensor]:
    """Every tensor that the graph computes for random tokens, by node name."""
    ids = torch.randint(3, 50, (2, tokens), generator=torch.Generator().manual_seed(tokens))
    inputs: dict[str, Tensor] = {}
    for port, node in zip(program.inputs, program.placeholders(), strict=True):
        shape = [size if isinstance(size, int) else 0 for size in node.meta["val"].shape]
        match port.role:
            case Role.INPUT_IDS:
                inputs[node.name] = ids
            case Role.POSITION_IDS:
                inputs[node.name] = torch.arange(tokens).repeat(2, 1)
            case Role.BUDGET:
                inputs[node.name] = budget
            case _:
                inputs[node.name] = torch.zeros(2, shape[1], tokens + 8, shape[3], dtype=node.meta["val"].dtype)
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
