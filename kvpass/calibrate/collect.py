"""Run a captured graph on samples of text and gather moments of one tap of every layer."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from kvpass.calibrate.moments import Moments
from kvpass.ir.attention_site import attention_sites
from kvpass.ir.program import KVProgram, Role
from kvpass.ir.taps import Taps

Progress = Callable[[int, int], None]  # called with the layers done so far and those of all samples


def collect(
    program: KVProgram, tap: str, samples: Sequence[Tensor], skip: int, progress: Progress | None = None
) -> list[Moments]:
    """The moments of `tap` [B, H, S, D], layer by layer, over all samples but their first `skip` tokens.

    program: located; samples: i64[B, S] each, S > skip. By dataflow, so that it works for whatever could be captured.
    Raises `MissingTapError` if a layer does not have the tap.
    """
    taps = Taps(program)
    sites = attention_sites(program)
    found = [Moments() for _ in sites]
    layers = {taps.node(site, tap): taps.of_layer(site) for site in sites}
    nodes = dict(zip(layers, found, strict=True))
    done = 0

    def take(node: Node, states: Tensor) -> None:
        nonlocal done
        given = layers[node].values({tap: states})[tap]
        assert isinstance(given, Tensor)
        nodes[node].add(given[:, :, skip:])
        done += 1
        if progress is not None:
            progress(done, len(samples) * len(sites))

    device = sites[0].queries.meta["val"].device
    reader = _Reader(program, dict.fromkeys(nodes, take))
    for ids in samples:
        positions = torch.arange(ids.shape[1], device=device).expand(ids.shape)
        given = {Role.INPUT_IDS: ids.to(device), Role.POSITION_IDS: positions}
        with torch.no_grad():
            reader.run(*(given[port.role] for port in program.inputs))
    return found


class _Reader(Interpreter):
    """Hands over what the tapped nodes compute as soon as they did, and computes nothing that they do not need.

    A value is freed behind its last use, so the memory is that of one layer.
    """

    def __init__(self, program: KVProgram, taken: Mapping[Node, Callable[[Node, Tensor], None]]) -> None:
        super().__init__(program.graph_module)
        self._taken = taken
        self._needed = set(program.placeholders())
        work = list(taken)
        while work:
            node = work.pop()
            if node not in self._needed:
                self._needed.add(node)
                work.extend(node.all_input_nodes)

    def run_node(self, n: Node) -> object:
        if n not in self._needed:
            return None
        result: object = super().run_node(n)
        if n in self._taken:
            assert isinstance(result, Tensor)
            self._taken[n](n, result)
        return result
