"""How a batch of rows goes through the phase graphs into a cache."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvpass.backends import TENSORRT, streams_memory
from kvpass.backends.engine_sizes import EngineSizes, Profile, sizes_of
from kvpass.backends.inductor import RegionalGraph
from kvpass.budget import Budget, Prompt
from kvpass.errors import InputError, PressError
from kvpass.ir.form import Phase
from kvpass.ir.program import Role
from kvpass.pass_manager import Pass
from kvpass.passes.lower_for_tensorrt import LowerForTensorRT
from kvpass.pipeline import phase_passes
from kvpass.press import Press
from kvpass.prompts import prompts_of
from kvpass.registry import press_text
from kvpass.runtime.cache import CompressedCache
from kvpass.runtime.guard import choose_phase
from kvpass.runtime.layout import CacheLayout, Context, Extent
from kvpass.runtime.phases import PhaseGraph, PhaseGraphs, PrintIR
from kvpass.runtime.rows import Rows

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """How a model was compiled."""

    press: Press | None
    budget: Budget
    backend: str | Callable[..., Any]
    mode: str | None
    max_tokens: int
    layers: frozenset[int] | None = None  # those to press, None: all that can be
    print_ir: PrintIR = None
    profile: Profile | None = None  # sizes that TensorRT builds engines for


@dataclass(frozen=True)
class _Plan:
    """What is counted on the host for neighbouring rows of equal length."""

    rows: slice
    phase: Phase
    press: Press | None
    prompts: tuple[Prompt, ...]  # one per layer
    entries: tuple[int, ...]  # slots per layer

    @property
    def batch(self) -> int:
        return int(self.rows.stop - self.rows.start)


@dataclass
class Execution:
    """The phase graphs of one compiled model, built at their first use."""

    graphs: PhaseGraphs
    layout: CacheLayout
    recipe: Recipe
    device: torch.device

    def __post_init__(self) -> None:
        self.ready: dict[tuple[Phase, Press | None, bool, bool], PhaseGraph] = {}

    def phase(
        self, phase: Phase, press: Press | None = None, *, embeddings: bool = False, one_row: bool = False
    ) -> PhaseGraph:
        """The graph of a phase; the press matters in prefill alone. See `phase_passes`."""
        key = (phase, press, embeddings, one_row)
        if key not in self.ready:
            recipe = self.recipe
            steps = self.passes(phase, press, embeddings=embeddings, one_row=one_row)
            sizes = self._engine_sizes(phase, press)
            self.ready[key] = self.graphs.get(steps, recipe.backend, recipe.mode, recipe.print_ir, sizes)
        return self.ready[key]

    def passes(
        self, phase: Phase, press: Press | None = None, *, embeddings: bool = False, one_row: bool = False
    ) -> tuple[Pass, ...]:
        """The passes that make the graph of a phase."""
        tensorrt, sizes = None, self._engine_sizes(phase, press)
        if sizes is not None:
            most = sizes.prompts.greatest(len(self.layout.layers)) if sizes.prompts else ()
            told = press_text(self.recipe.press) if self.recipe.press and sizes.prompts else "no press"
            tensorrt = LowerForTensorRT(sizes.tokens[2], most, told)
        return phase_passes(
            phase,
            press,
            self.recipe.layers,
            embeddings=embeddings,
            one_row=one_row,
            functional=sizes is not None,
            tensorrt=tensorrt,
        )

    def _engine_sizes(self, phase: Phase, press: Press | None) -> EngineSizes | None:
        """For which sizes TensorRT is to build an engine."""
        recipe, layers = self.recipe, self.layout.layers
        if recipe.backend != TENSORRT:
            return None
        prompts = None
        if phase is Phase.PREFILL:
            known = prompts_of(recipe.press if press else None, recipe.budget, len(layers), recipe.max_tokens)
            prompts = next((those for those in known if those.press == press), known[-1])
        return sizes_of(phase, prompts, recipe.max_tokens, tuple(layer.ring for layer in layers), recipe.profile or {})

    # -- a first prompt ----------------------------------------------------------------------------------------

    def prefill(self, cache: CompressedCache, rows: Rows, columns: int) -> Tensor:
        """Read prompts into an empty cache; the logits of each row's last token. [B, 1, V]

        Rows of different length go through the graph one after the other, so that each is compressed as if it were
        alone, and nothing is computed for padding.
        """
        plans = [self._plan(*group) for group in rows.groups()]
        following = _moved_on(plans, rows)
        cache.allocate(len(rows.counts), [max(layer) for layer in zip(*(p.entries for p in plans), strict=True)])
        logits, left = [], []
        for plan in plans:
            graph = self.phase(plan.phase, plan.press, embeddings=rows.embedded)
            outputs = self._run(graph, cache, rows, plan.rows, plan.prompts[0].tokens, self._numbers(graph, plan))
            named = zip(graph.program.outputs, outputs, strict=True)
            left.append({(port.role, port.layer): value for port, value in named})
            logits.append(outputs[0][:, -1:])
        kept = [_joined_positions(plans, left, layer) for layer in range(len(self.layout.layers))]
        context = Context(
            Extent.empty(len(rows.counts)).grown(columns, rows.counts, following),
            tuple(
                tuple(plan.entries[layer] for plan in plans for _ in range(plan.batch))
                for layer in range(len(self.layout.layers))
            ),
        )
        cache.begin(context, kept, self._counts(plans, left))
        return logits[0] if len(logits) == 1 else torch.cat(logits)

    def _plan(self, rows: slice, tokens: int, question: int | None) -> _Plan:
        press = self.recipe.press
        prompts = tuple(
            Prompt(tokens, self.recipe.budget, layer, len(self.layout.layers), question)
            for layer in range(len(self.layout.layers))
        )
        fits = press is None or press.fits(prompts[0])
        phase = choose_phase(tokens, 0, fits=fits)
        if press is not None and not fits:
            log.info("a prompt of %d tokens is kept whole: %s needs %d", tokens, press.name, press.min_tokens)
        chosen = press.for_prompt(prompts[0]) if press is not None and phase is Phase.PREFILL else None
        entries = [
            chosen.sizes(prompt).get("budget", tokens) if chosen and layer.pressed else tokens
            for prompt, layer in zip(prompts, self.layout.layers, strict=True)
        ]
        held = tuple(entries[self.layout.holder(layer)] for layer in range(len(entries)))
        return _Plan(rows, phase, chosen, prompts, held)

    def _numbers(self, graph: PhaseGraph, plan: _Plan) -> dict[str, Tensor]:
        """Sizes and scalars that the press counts on the host."""
        given: dict[str, Tensor] = {}
        for port in graph.program.inputs:
            if port.role in (Role.SIZE, Role.SCALAR):
                assert plan.press is not None
                prompt = plan.prompts[port.layer or 0]
                if port.role is Role.SIZE:
                    given[port.name] = torch.empty(plan.press.sizes(prompt)[port.key], device=self.device)
                else:
                    given[port.name] = torch.tensor(plan.press.scalars(prompt)[port.key], device=self.device)
        return given

    def _counts(
        self, plans: Sequence[_Plan], left: Sequence[Mapping[tuple[Role, int | None], Tensor]]
    ) -> dict[int, Tensor]:
        """How many slots each row occupies in layers where the press decided that. i64[B] by layer"""
        layers = sorted({layer for held in left for role, layer in held if role is Role.COUNT and layer is not None})
        found = {}
        for layer in layers:
            parts = [
                held.get((Role.COUNT, layer), torch.full((plan.batch,), plan.entries[layer], device=self.device))
                for plan, held in zip(plans, left, strict=True)
            ]
            found[layer] = parts[0] if len(parts) == 1 else torch.cat(parts)
        return found

    # -- more tokens -------------------------------------------------------------------------------------------

    def append(self, cache: CompressedCache, rows: Rows, columns: int) -> Tensor:
        """Read tokens behind what the cache holds; their logits. [B, columns, V]"""
        tokens = rows.tokens.shape[1]
        cache.reserve(tokens)
        parts = [self._append_rows(cache, rows, group) for group in self._neighbours(cache, rows)]
        cache.advance(columns, None if rows.alike and tokens == columns else rows.counts, rows.next_positions)
        return rows.as_given(parts[0] if len(parts) == 1 else torch.cat(parts))

    def _neighbours(self, cache: CompressedCache, rows: Rows) -> list[slice]:
        """All rows, but where a graph has one position for all: neighbours that stand at the same one."""
        if not self.graphs.located.rows_share_positions:
            return [slice(0, len(rows.counts))]
        places = list(zip(cache.next_positions, rows.counts, strict=True))
        starts = [i for i, place in enumerate(places) if i == 0 or place != places[i - 1]]
        return [slice(first, last) for first, last in zip(starts, [*starts[1:], len(places)], strict=True)]

    def _append_rows(self, cache: CompressedCache, rows: Rows, chosen: slice) -> Tensor:
        """The logits [b, S, V] of some rows; behind a row's own tokens they are of no use."""
        longest, counts = rows.tokens.shape[1], rows.counts[chosen]
        most = max(counts)
        phase = choose_phase(most, cache.seen_tokens or 1)
        one_row = phase is Phase.DECODE and len(counts) == 1 and streams_memory(self.recipe.backend, self.device)
        graph = self.phase(phase, embeddings=rows.embedded, one_row=one_row)
        given = {}
        if any(port.role is Role.NEW_TOKENS for _, port in graph.per_call):
            given[Role.NEW_TOKENS.value] = torch.tensor(counts, device=self.device)
        logits = self._run(graph, cache, rows, chosen, most, given)[0]
        return torch.nn.functional.pad(logits, (0, 0, 0, longest - most)) if most < longest else logits

    def _run(
        self,
        graph: PhaseGraph,
        cache: CompressedCache,
        rows: Rows,
        chosen: slice,
        count: int,
        given: Mapping[str, Tensor],
    ) -> tuple[Tensor, ...]:
        """Run a graph on the first `count` tokens of some rows."""
        whole = (chosen.start, chosen.stop) == (0, cache.lengths.shape[1])
        tokens = rows.tokens[chosen, :count].contiguous()
        inputs = cache.storage(graph.program.inputs, None if whole else chosen)
        for place, port in graph.per_call:
            match port.role:
                case Role.INPUT_IDS:
                    inputs[place] = tokens
                case Role.EMBEDDINGS:
                    width = int(graph.program.input_node(Role.EMBEDDINGS).meta["val"].shape[2])
                    if tokens.shape[2] != width:
                        raise InputError(f"inputs_embeds are {tokens.shape[2]} wide, the model's embeddings {width}")
                    inputs[place] = tokens
                case Role.POSITION_IDS | Role.POSITION_AXES:
                    inputs[place] = self._positions(graph, cache, rows, chosen, count)[port.role]
                case Role.LENGTHS:
                    inputs[place] = cache.lengths if whole else cache.lengths[:, chosen].contiguous()
                case Role.NEW_TOKENS if port.name not in given:
                    inputs[place] = torch.full((tokens.shape[0],), count, device=self.device)
                case _:
                    inputs[place] = given[port.name]
        one_row = whole and len(tokens) == 1  # products of several are a library's, a part is another tensor each time
        outputs = self._step(graph, cache, inputs) if one_row else graph.run(*inputs)
        if graph.returned:
            stored = [(port, outputs[place]) for place, port in graph.returned]
            cache.store(stored, None if whole else chosen)
        return outputs

    def _step(self, graph: PhaseGraph, cache: CompressedCache, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run a graph; a decode step again as it was recorded with this cache, while that stays where it is."""
        if graph.program.phase is not Phase.DECODE or not isinstance(graph.run, RegionalGraph):
            return graph.run(*inputs)
        if cache.step is not None and cache.step.serves(graph.run, inputs):
            return cache.step(inputs)
        cache.step = graph.run.record(inputs)
        return graph.run(*inputs) if cache.step is None else cache.step.left()

    def _positions(
        self, graph: PhaseGraph, cache: CompressedCache, rows: Rows, chosen: slice, count: int
    ) -> dict[Role, Tensor]:
        """The positions [b, S] of some rows, and those on each axis, [axes, b, S]."""
        counted = cache.next_of_rows[chosen, None] + torch.arange(count, device=self.device)
        axes = graph.axes
        if rows.positions is None:
            return {Role.POSITION_IDS: counted, Role.POSITION_AXES: counted.expand(axes, -1, -1).contiguous()}
        own = rows.positions[:, chosen, :count]
        if len(own) not in (1, axes) or self.graphs.located.rows_share_positions:
            shared = self.graphs.located.rows_share_positions
            takes = "none, it counts them itself" if shared else f"{axes} axes"
            raise InputError(f"positions have {len(own)} axes, this model takes {takes}")
        if axes == 1:
            return {Role.POSITION_IDS: own[0].contiguous()}
        return {Role.POSITION_IDS: counted, Role.POSITION_AXES: own.expand(axes, -1, -1).contiguous()}


def _moved_on(plans: Sequence[_Plan], rows: Rows) -> Sequence[int] | None:
    """Where each row goes on, if that is not behind the tokens that it read."""
    ends = [plan.press.next_position(plan.prompts[0]) if plan.press else plan.prompts[0].tokens for plan in plans]
    moved = [plan for plan, end in zip(plans, ends, strict=True) if end != plan.prompts[0].tokens]
    if rows.positions is None:
        return [end for end, plan in zip(ends, plans, strict=True) for _ in range(plan.batch)] if moved else None
    if moved and moved[0].press is not None:
        raise PressError(
            f"{moved[0].press.name} moves keys to stand side by side, which is not where positions= puts them; use the "
            "press inside it"
        )
    return rows.next_positions


def _joined_positions(
    plans: Sequence[_Plan], left: Sequence[Mapping[tuple[Role, int | None], Tensor]], layer: int
) -> Tensor | None:
    """The kept positions of a layer in all rows, i64[B, Hkv, n]; None if all of them kept everything."""
    parts = [held.get((Role.KEPT, layer)) for held in left]
    found = [part for part in parts if part is not None]
    if len(parts) == 1 or not found:
        return parts[0]
    widest = max(plan.entries[layer] for plan in plans)
    joined = []
    for plan, part in zip(plans, parts, strict=True):
        if part is None:  # kept whole
            part = torch.arange(plan.entries[layer], device=found[0].device).expand(plan.batch, found[0].shape[1], -1)
        joined.append(torch.nn.functional.pad(part, (0, widest - part.shape[2]), value=-1))
    return torch.cat(joined)
