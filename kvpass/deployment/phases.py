"""The phases of a compiled model as programs of torch.export that count for themselves.

A deployed phase takes token ids and the state that the one before it left, and nothing else:

    prefill(input_ids)                                    -> logits [B, 1, V], state, the positions that were kept
    extend(input_ids, lengths, next_position, caches...)  -> logits [B, S, V], state
    decode(input_ids, lengths, next_position, caches...)  -> logits [B, 1, V], state

State is `lengths` i64[L, B] (slots in use per layer; of a ring, tokens seen), `next_position` i64[B], and the caches of
each layer. A prefill returns caches as long as what it kept; whoever runs it puts them into buffers with room. The
other phases write to the state, or return it if they are functional.
"""

import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils._sympy.value_ranges import ValueRanges

from kvpass.backends.engine_sizes import EngineSizes
from kvpass.deployment.assumptions import broken_assumption
from kvpass.deployment.guarded import Guarded
from kvpass.deployment.modules import Given, Named, Prefill, Step
from kvpass.errors import PackageError
from kvpass.ir.program import STORED, KVProgram
from kvpass.ir.symbols import SYMBOLIC
from kvpass.prompts import Prompts
from kvpass.runtime.layout import CacheLayout

CAPACITY = 1031  # slots of the first layer in the example; others have more, so that no two sizes are taken for one
TOKENS = 67  # of the example beyond what the shortest prompt needs
Examples = Mapping[str, tuple[Tensor, dict[int, object]]]  # inputs by name, with the axes that are dynamic


def export_prefill(program: KVProgram, layout: CacheLayout, prompts: Prompts, *, batch_size: int) -> ExportedProgram:
    """The functional prefill graph as a program of the ids alone."""

    def tried(tokens: int) -> ExportedProgram:
        module = Prefill(program, layout, prompts, batch_size)
        ids = torch.zeros(batch_size, tokens, dtype=torch.int64, device=module.device)
        return _exported(module, {"input_ids": (ids, {1: Dim.DYNAMIC(min=prompts.tokens[0], max=prompts.tokens[-1])})})

    return _good_for_all(prompts.tokens, tried)


def export_given(program: KVProgram, sizes: EngineSizes, *, batch_size: int) -> ExportedProgram:
    """A functional graph as a program of what kvpass gives it at every call. See `Given`."""
    least, _, most = sizes.tokens

    def tried(tokens: int) -> ExportedProgram:
        module = Given(program, sizes.prompts)
        examples: dict[str, tuple[Tensor, dict[int, object]]] = {}
        for port in module.ports:
            value = next(node for node in program.placeholders() if node.target == port.name).meta["val"]
            shape, axes = list(value.shape), dict[int, object]()
            for axis, name in enumerate(map(program.shapes.text, value.shape)):
                ring = None if port.layer is None else sizes.rings[port.layer]
                if name == "B":
                    shape[axis] = batch_size
                elif name == "S":
                    shape[axis], axes[axis] = tokens, Dim.DYNAMIC(min=least, max=most)
                elif port.role in STORED and isinstance(value.shape[axis], SYMBOLIC):
                    shape[axis] = ring or CAPACITY + (port.layer or 0)
                    axes |= {} if ring else {axis: Dim.DYNAMIC}
            examples[port.name] = (torch.zeros(shape, dtype=value.dtype, device=module.device), axes)
        return _exported(module, examples)

    if sizes.prompts is None:
        return _traced_with(max(least, min(TOKENS, most)), tried)
    return _good_for_all(sizes.prompts.tokens, tried)


def _traced_with(most: int, tried: Callable[[int], ExportedProgram]) -> ExportedProgram:
    """A program exported with so many tokens, or with a few less: a small number can equal another size."""
    for tokens in range(most, max(most - 8, 0), -1):
        try:
            return tried(tokens)
        except ValueError as error:
            refused = error
    raise PackageError(f"no graph holds for all numbers of tokens up to {most}: {refused}") from refused


def _good_for_all(prompts: Sequence[int], tried: Callable[[int], ExportedProgram]) -> ExportedProgram:
    """A program exported with a prompt of some tokens that holds for all `prompts`.

    Raises `PackageError` if there is none.
    """
    usual = [n for n in prompts if n >= 2 * prompts[0] + TOKENS]
    for tokens in [usual[0], usual[-1], usual[len(usual) // 2]] if usual else prompts[::-1]:
        try:
            made = tried(tokens)
        except ValueError as error:  # a short example can equal another size, e.g. the number of heads
            refused = str(error)
            continue
        if (assumed := broken_assumption(made, prompts)) is None:
            return made
        refused = assumed  # a part of the example was a single token, say
    raise PackageError(f"no graph holds for all prompts of {prompts[0]} to {prompts[-1]} tokens: {refused}")


def export_step(
    program: KVProgram, layout: CacheLayout, *, batch_size: int, longest: int, functional: bool
) -> ExportedProgram:
    """The extend or decode graph as a program of ids and state."""

    def tried(tokens: int) -> ExportedProgram:
        module = Step(program, batch_size, functional=functional)
        ids = torch.zeros(batch_size, 1 if module.decodes else tokens, dtype=torch.int64, device=module.device)
        axes: dict[int, object] = {} if module.decodes else {1: Dim.DYNAMIC(min=2, max=longest)}
        return _exported(module, {"input_ids": (ids, axes), **_state(module, layout, batch_size)})

    return _traced_with(min(TOKENS, longest), tried)


def export_guarded(
    prefill: KVProgram, extend: KVProgram, layout: CacheLayout, prompts: Prompts, *, batch_size: int, capacity: int
) -> ExportedProgram:
    """Prefill and extend in one program over caches of `capacity` slots. See `Guarded`."""
    step = Step(extend, batch_size, functional=True)
    module = Guarded(Prefill(prefill, layout, prompts, batch_size), step)
    shortest, longest = prompts.tokens[0], prompts.tokens[-1]
    tokens = min(longest, 2 * shortest + TOKENS)
    ids = torch.zeros(batch_size, tokens, dtype=torch.int64, device=step.device)
    new_tokens = torch.full((batch_size,), tokens, device=step.device)
    examples: dict[str, tuple[Tensor, dict[int, object]]] = {
        "input_ids": (ids, {1: Dim.DYNAMIC(min=shortest, max=longest)}),
        "new_tokens": (new_tokens, {}),
    }
    for name, (tensor, axes) in _state(step, layout, batch_size).items():
        fixed = tensor.new_zeros(*tensor.shape[:2], capacity, *tensor.shape[3:]) if axes else tensor
        examples[name] = (fixed, {})
    return _exported(module, examples)


def _state(module: Step, layout: CacheLayout, batch_size: int) -> Examples:
    """lengths, next_position, and the caches of each layer; rings have as many slots as they reach."""

    def counts(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=module.device)

    examples: dict[str, tuple[Tensor, dict[int, object]]] = {
        "lengths": (counts(len(layout.layers), batch_size), {}),
        "next_position": (counts(batch_size), {}),
    }
    for port in module.stored:
        assert port.layer is not None
        ring = layout.layers[port.layer].ring
        buffers = layout.layers[port.layer].buffers(batch_size, ring or CAPACITY + port.layer, module.device)
        examples[port.name] = (buffers[STORED.index(port.role)], {} if ring else {2: Dim.DYNAMIC})
    return examples


def _exported(module: nn.Module, examples: Examples) -> ExportedProgram:
    """`module` with inputs of these names."""
    forward = module.forward

    def named(*inputs: Tensor) -> Named:
        outputs: Named = forward(*inputs)
        return outputs

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    signature: Any = named
    signature.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in examples])
    module.forward = named
    tensors, axes = zip(*examples.values(), strict=True)
    # Filling torch's cache of fake results costs more than it saves.
    with torch.no_grad(), torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
        program = export(
            module,
            tensors,
            dynamic_shapes=tuple({axis: _widened(wanted) for axis, wanted in found.items()} for found in axes),
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )
    for part in program.graph_module.modules():  # branches, too
        if isinstance(part, GraphModule):
            _tidy(part)
    _allow_all(program, examples)
    return program


def _widened(wanted: Any) -> Any:
    """A range in which tracing may rule a size out: of two that are allowed, the other one would be a constant."""
    least, most = getattr(wanted, "min", None), getattr(wanted, "max", None)
    return wanted if least is None or most is None else Dim.DYNAMIC(min=least, max=max(most, least + TOKENS))


def _allow_all(program: ExportedProgram, examples: Examples) -> None:
    """Give sizes the range that was asked for: tracing takes it that no size in between is 1, see `_tidy`."""
    for node in program.graph.find_nodes(op="placeholder"):
        for axis, wanted in examples.get(node.name, (None, {}))[1].items():
            symbol, asked = node.meta["val"].shape[axis].node.expr, getattr(wanted, "min", None)
            if asked is not None:
                program.range_constraints[symbol] = ValueRanges(asked, wanted.max)  # type: ignore[attr-defined]


def _tidy(module: GraphModule) -> None:
    """Drop what tracing claims of sizes being greater than others, and write sums of sizes as files can hold them.

    It assumes that no size is 1, and no result depends on that: the shortest prompt that a press takes leaves a single
    token beside its window, a chunk may leave one as well. That sizes are equal stays, for results do depend on it.
    """
    for node in list(module.graph.nodes):
        if node.target is torch.ops.aten._assert_scalar.default and _is_dispensable(node.args[0]):
            module.graph.erase_node(node)
        elif node.target is torch.sym_sum:
            (total, *terms), value = node.args[0], _value(node.args[0][0])
            with module.graph.inserting_before(node):
                for term in terms:
                    value = value + _value(term)
                    total = module.graph.call_function(operator.add, (total, term))
                    total.meta["val"] = value
            node.replace_all_uses_with(total)
            module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    module.recompile()


def _is_dispensable(claim: object) -> bool:
    """Whether it says no equality, nor anything of a size that a table tells, of which compilers know nothing else."""
    if not isinstance(claim, Node) or free_unbacked_symbols(claim.meta["val"]):
        return False
    return not isinstance(claim.meta["val"].node.expr, sympy.Eq)


def _value(size: Any) -> Any:
    return size.meta["val"] if isinstance(size, Node) else size
