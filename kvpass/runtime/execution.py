"""How a batch of rows goes through the phase graphs into a cache."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvpass.budget import Budget, Prompt
from kvpass.ir.form import Phase
from kvpass.ir.program import Port, Role
from kvpass.press import Press
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
        self.ready: dict[tuple[Phase, Press | None], PhaseGraph] = {}

    def phase(self, phase: Phase, press: Press | None = None) -> PhaseGraph:
        """The graph of a phase; the press matters in prefill alone."""
        key = (phase, press)
        if key not in self.ready:
            recipe = self.recipe
            self.ready[key] = self.graphs.get(phase, press, recipe.layers, recipe.backend, recipe.mode, recipe.print_ir)
        return self.ready[key]

    # -- a first prompt ----------------------------------------------------------------------------------------

    def prefill(self, cache: CompressedCache, rows: Rows, columns: int) -> Tensor:
        """Read prompts into an empty cache; the logits of each row's last token. [B, 1, V]

        Rows of different length go through the graph one after the other, so that each is compressed as if it were
        alone, and nothing is computed for padding.
        """
        plans = [self._plan(*group) for group in rows.groups()]
        cache.allocate(len(rows.counts), [max(layer) for layer in zip(*(p.entries for p in plans), strict=True)])
        logits, left = [], []
        for plan in plans:
            ids = rows.ids[plan.rows, : plan.prompts[0].tokens]
            graph = self.phase(plan.phase, plan.press)
            outputs = self._run(graph, cache, plan.rows, ids.contiguous(), self._numbers(graph, plan))
            named = zip(graph.program.outputs, outputs, strict=True)
            left.append({(port.role, port.layer): value for port, value in named})
            logits.append(outputs[0][:, -1:])
        kept = [_joined_positions(plans, left, layer) for layer in range(len(self.layout.layers))]
        context = Context(
            Extent(seen=(0,) * len(rows.counts)).grown(columns, rows.counts),
            tuple(position for plan in plans for position in _next_positions(plan)),
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
        entries = tuple(
            chosen.sizes(prompt).get("budget", tokens) if chosen and layer.pressed else tokens
            for prompt, layer in zip(prompts, self.layout.layers, strict=True)
        )
        return _Plan(rows, phase, chosen, prompts, entries)

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
        tokens = rows.ids.shape[1]
        cache.reserve(tokens)
        parts = [self._append_rows(cache, rows, group) for group in self._neighbours(cache, rows)]
        cache.advance(columns, None if rows.alike and tokens == columns else rows.counts)
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
        longest, counts = rows.ids.shape[1], rows.counts[chosen]
        ids = rows.ids[chosen, : max(counts)].contiguous()
        graph = self.phase(choose_phase(ids.shape[1], cache.seen_tokens or 1))
        given = {}
        if any(port.role is Role.NEW_TOKENS for port in graph.program.inputs):
            given[Role.NEW_TOKENS.value] = torch.tensor(counts, device=self.device)
        logits = self._run(graph, cache, chosen, ids, given)[0]
        return torch.nn.functional.pad(logits, (0, 0, 0, longest - max(counts))) if max(counts) < longest else logits

    def _run(
        self, graph: PhaseGraph, cache: CompressedCache, rows: slice, ids: Tensor, given: Mapping[str, Tensor]
    ) -> tuple[Tensor, ...]:
        whole = (rows.start, rows.stop) == (0, cache.lengths.shape[1])
        inputs = []
        for port in graph.program.inputs:
            match port.role:
                case Role.INPUT_IDS:
                    inputs.append(ids)
                case Role.POSITION_IDS:
                    steps = torch.arange(ids.shape[1], device=self.device)
                    inputs.append(cache.next_of_rows[rows, None] + steps)
                case Role.LENGTHS:
                    inputs.append(cache.lengths if whole else cache.lengths[:, rows].contiguous())
                case Role.KEYS | Role.VALUES | Role.POSITIONS:
                    buffer = _buffer(cache, port)
                    inputs.append(buffer if whole else buffer[rows])
                case Role.NEW_TOKENS if port.name not in given:
                    inputs.append(torch.full((ids.shape[0],), ids.shape[1], device=self.device))
                case _:
                    inputs.append(given[port.name])
        return graph.run(*inputs)


def _buffer(cache: CompressedCache, port: Port) -> Tensor:
    assert port.layer is not None
    return cache.buffers(port.layer)[(Role.KEYS, Role.VALUES, Role.POSITIONS).index(port.role)]


def _next_positions(plan: _Plan) -> list[int]:
    prompt = plan.prompts[0]
    return [plan.press.next_position(prompt) if plan.press else prompt.tokens] * plan.batch


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
