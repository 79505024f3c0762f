"""A phase graph as TensorRT engines that kvpass runs, one for each number of rows."""

import logging
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from kvpass.backends.engine_sizes import EngineSizes
from kvpass.backends.tensorrt.conversion import Extent, Network
from kvpass.backends.tensorrt.engines import Engine, network_of
from kvpass.backends.tensorrt.library import library
from kvpass.deployment.manifest import PhaseSpec, TensorSpec, phase_spec
from kvpass.deployment.phases import export_given
from kvpass.errors import PackageError
from kvpass.ir.program import KVProgram

log = logging.getLogger(__name__)
Run = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


class EngineGraph:
    """Runs a functional graph; what it keeps of a text leaves it as outputs, which the caller stores.

    An engine is built when the first batch of so many rows comes, which takes as long as a compilation.
    """

    def __init__(self, program: KVProgram, sizes: EngineSizes) -> None:
        """Raises `PackageError` if there is no GPU, or no TensorRT."""
        check_device(program.token_node().meta["val"].device)
        library()
        self._program, self._sizes = program, sizes
        self._tokens = [str(node.target) for node in program.placeholders()].index(str(program.token_node().target))
        self._ready: dict[int, tuple[PhaseSpec, Run]] = {}

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        rows = int(inputs[self._tokens].shape[0])
        if rows not in self._ready:
            log.info("building a TensorRT engine of %s for %d rows", self._phase, rows)
            spec, network = self.network(rows)
            self._ready[rows] = spec, runnable(network, spec)
        spec, run = self._ready[rows]
        given = {port.name: tensor for port, tensor in zip(self._program.inputs, inputs, strict=True)}
        outputs = run({port.name: given[port.name] for port in spec.inputs})
        return tuple(outputs[port.name] for port in self._program.outputs)

    def network(self, rows: int) -> tuple[PhaseSpec, Network]:
        """What an engine is built of. Raises `PackageError` that names the operators which TensorRT does not take."""
        program = export_given(self._program, self._sizes, batch_size=rows)
        least, _, most = self._sizes.tokens
        spec = phase_spec(self._phase, self._phase, [(least, most)], program)
        extents = {port.name: self._extent(port) for port in spec.inputs}
        prompts = self._sizes.prompts
        return spec, network_of(program, spec, extents, prompts.press.name if prompts and prompts.press else None)

    @property
    def _phase(self) -> str:
        assert self._program.phase is not None
        return self._program.phase.value

    def _extent(self, port: TensorSpec) -> Extent:
        def shape(which: int) -> tuple[int, ...]:
            known = {"S": self._sizes.tokens[which]}
            return tuple(n if isinstance(n, int) else known.get(n, self._sizes.slots[which]) for n in port.shape)

        return Extent(shape(0), shape(1), shape(2), tuple(map(str, port.shape)))


def check_device(device: torch.device) -> None:
    """Raises `PackageError` for a device that runs no engines."""
    if device.type != "cuda":
        raise PackageError(
            f"backend='tensorrt' runs engines on a CUDA device, the model is on {device}; move it there, or build "
            "engines for another machine with model.export(path, format='tensorrt')"
        )


def runnable(network: Network, spec: PhaseSpec) -> Run:
    """Build the engine for the GPU that is here."""
    return Engine(network.build(), spec).run
