"""Named symbolic sizes: the one place that talks to torch's shape environment."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import sympy
import torch
from torch import SymBool, SymFloat, SymInt, Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
    StrictMinMaxConstraint,
)
from torch.utils._sympy.value_ranges import ValueRanges

Size = int | SymInt
SYMBOLIC = (SymInt, SymFloat, SymBool)


class SymbolicShapes:
    """The sizes of one program (B, S, C, N, ...) and the fake tensors made of them.

    Every symbol has a name of ours, a range and a hint. torch derives its own names from hashes, so that they
    differ between processes; everything that is printed goes through `text`.
    """

    def __init__(self) -> None:
        # Duck shaping would take two sizes for one because their hints happen to agree.
        self.shape_env = ShapeEnv(duck_shape=False)
        self.fake_mode = FakeTensorMode(shape_env=self.shape_env)
        self.fake_mode.cache_enabled = False  # filling it costs more than it saves
        self._sizes: dict[str, Size] = {}
        self._ranges: dict[str, tuple[int, int, int]] = {}
        self._names: dict[sympy.Symbol, sympy.Symbol] = {}

    def dim(self, name: str, hint: int, low: int = 2, high: int = 2**31 - 1) -> Size:
        """The symbolic size called `name`, created at its first mention."""
        if name not in self._sizes:
            context: Any = StatelessSymbolicContext(
                dynamic_sizes=[DimDynamic.DYNAMIC],
                constraint_sizes=[StrictMinMaxConstraint(vr=ValueRanges(low, high), warn_only=False)],
            )
            carrier = self.fake_mode.from_tensor(
                torch.empty(hint, device="meta"), source=ConstantSource(name), symbolic_context=context
            )
            size = cast(SymInt, carrier.shape[0])
            self._sizes[name] = size
            self._ranges[name] = (hint, low, high)
            self._names[size.node.expr] = sympy.Symbol(name, integer=True, positive=True)
        return self._sizes[name]

    def fix(self, name: str, value: int) -> Size:
        """Give the size called `name` a constant value."""
        return self._sizes.setdefault(name, value)

    def __getitem__(self, name: str) -> Size:
        return self._sizes[name]

    def size(self, expr: Any) -> Size:
        """The size that an expression of torch's symbols says."""
        return int(expr) if expr.is_Integer else self.shape_env.create_symintnode(expr, hint=None)

    def range_of(self, symbol: Any) -> object:
        """Hint, least and greatest value of one of torch's symbols: what tracing may ask of it; itself if unknown."""
        return self._ranges[str(self._names[symbol])] if symbol in self._names else symbol

    def declared(self) -> dict[str, int | tuple[int, int, int]]:
        """All sizes by name: a constant, or hint, least and greatest value, as `fix` and `dim` take them."""
        return {name: size if isinstance(size, int) else self._ranges[name] for name, size in self._sizes.items()}

    def named(self, expr: Any) -> Any:
        """An expression of torch's symbols in our names."""
        return sympy.sympify(self.shape_env.replace(expr)).xreplace(self._names)

    def bind(self, **values: Size) -> dict[str, Size]:
        """Values of sizes under torch's own symbol names, as `Subgraph.run` wants them."""
        return {str(self._sizes[name].node.expr): value for name, value in values.items()}  # type: ignore[union-attr]

    def empty(self, shape: Sequence[Size], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A fake tensor of this shape."""
        with self.fake_mode:
            return torch.empty(tuple(shape), dtype=dtype, device=device)

    def fake(self, real: Tensor) -> Tensor:
        """The fake twin of a parameter or buffer, all sizes constant."""
        return cast(Tensor, self.fake_mode.from_tensor(real, static_shapes=True))

    def twin(self, fake: Tensor) -> Tensor:
        """Another fake tensor of these sizes, strides and type, without asking an operator; no view of a part."""
        with in_kernel_invocation_manager(self.fake_mode):
            meta = torch.empty_strided(fake.size(), fake.stride(), dtype=fake.dtype, device="meta")
        return FakeTensor(self.fake_mode, meta, fake.device)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Fake values instead of numbers; sizes that only data can tell (tokens of an expert) stay unknown."""
        unknown = self.shape_env.ignore_fresh_unbacked_symbols()
        with self.fake_mode, enable_python_dispatcher(), torch.no_grad(), unknown:
            yield

    def text(self, size: object) -> str:
        """A size in our names, e.g. `S - 64`; equal in every process."""
        if not isinstance(size, SymInt):
            return str(size)
        return str(self.named(size.node.expr))

    def renamed(self, message: str) -> str:
        """A message about tensors that are being traced, in our names instead of torch's."""
        names = {str(symbol): str(name) for symbol, name in self._names.items()}
        return re.sub(r"\w+", lambda word: names.get(word[0], word[0]), message)

    def specialized(self) -> dict[str, str]:
        """Symbols that tracing has tied to a constant or to another symbol: always a bug of a pass or a press."""
        return {
            name: self.text(size)
            for name, size in self._sizes.items()
            if isinstance(size, SymInt) and self.text(size) != name
        }


def expression(size: object) -> Any:
    """The sympy expression of a size, in torch's symbols."""
    return size.node.expr if isinstance(size, SymInt) else sympy.sympify(size)


def symbols_in(value: object) -> Iterator[Any]:
    """The symbols in a size, or in the shape of a tensor, in order."""
    for size in value.shape if isinstance(value, Tensor) else (value,):
        if isinstance(size, SYMBOLIC):
            yield from sorted(size.node.expr.free_symbols, key=str)
