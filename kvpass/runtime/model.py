"""The compiled model: generates as any transformers model does, over a compressed cache."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from kvpass.budget import Budget, Prompt
from kvpass.errors import CacheError, InputError, PressError
from kvpass.ir.form import Phase
from kvpass.ir.printer import graph_diff, graph_text
from kvpass.ir.program import KVProgram, Role
from kvpass.pass_manager import PassManager, PassRecord
from kvpass.pipeline import phase_passes
from kvpass.press import Press
from kvpass.runtime.cache import CacheLayout, CompressedCache
from kvpass.runtime.guard import choose_phase
from kvpass.runtime.phases import PhaseGraph, PhaseGraphs, PrintIR
from kvpass.runtime.report import Report

log = logging.getLogger(__name__)

# Arguments that transformers hands to every model and that say nothing here.
HARMLESS = frozenset({"cache_position", "return_dict", "use_cache", "token_type_ids", "is_first_iteration"})


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


class CompiledModel(nn.Module, GenerationMixin):
    """Made by `kvpass.compile`. `generate()` as always; the cache it returns is a `CompressedCache`."""

    main_input_name = "input_ids"
    _is_stateful = False

    def __init__(
        self,
        graphs: PhaseGraphs,
        layout: CacheLayout,
        recipe: Recipe,
        config: PretrainedConfig,
        generation_config: GenerationConfig,
        capture_records: Sequence[PassRecord],
    ) -> None:
        super().__init__()
        self.weights = graphs.located.graph_module
        self.config = config
        self.generation_config = generation_config
        self._graphs = graphs
        self._layout = layout
        self._recipe = recipe
        self._capture_records = list(capture_records)
        self._ready: dict[tuple[Phase, Press | None], PhaseGraph] = {}
        self._last_prompt: tuple[int, list[int], int] = (0, [], 0)
        probe = next(self.weights.parameters())
        self._device, self._dtype = probe.device, probe.dtype

    # -- running -----------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: CompressedCache | None = None,
        logits_to_keep: int = 0,
        use_cache: bool | None = None,
        question_tokens: int | None = None,
        **unused: Any,
    ) -> CausalLMOutputWithPast:
        """Read `input_ids` i64[B, S] behind what the cache has seen.

        Logits are [B, 1, V] after the first prompt (its last token), [B, S, V] for tokens appended to a cache.
        `logits_to_keep=n` gives the last n; with a first prompt its last n - 1 tokens count as appended to it.
        `question_tokens`: how many tokens at the end of the prompt ask about the rest, for a press like finch.
        Raises `InputError` for what cannot be served, `CacheError` for a cache of another model or size.
        """
        ids = self._checked_ids(input_ids, unused)
        cache = self._checked_cache(past_key_values, ids)
        if attention_mask is not None:
            self._check_mask(attention_mask, ids, cache)
        first = cache.seen_tokens == 0
        if first:
            ids, question_tokens = self._question(ids, question_tokens, cache)
        if first and min(logits_to_keep, ids.shape[1]) > 1:
            return self._prompt_with_candidates(ids, min(logits_to_keep, ids.shape[1]) - 1, cache, use_cache)
        with torch.no_grad():
            logits = self._read(ids, cache, question_tokens)
        if first:  # also a prompt that was kept whole gives the logits of its last token alone
            logits = logits[:, -1:]
        if logits_to_keep:
            logits = logits[:, -logits_to_keep:]
        return CausalLMOutputWithPast(
            logits=logits,
            past_key_values=None if use_cache is False else cache,
        )

    def prefill(self, input_ids: Tensor, *, question_tokens: int | None = None) -> CausalLMOutputWithPast:
        """Read a prompt i64[B, S] into a new cache: `logits` [B, 1, V] of its last token, `past_key_values`."""
        result: CausalLMOutputWithPast = self(input_ids=input_ids, question_tokens=question_tokens)
        return result

    def set_budget(self, *, ratio: float | None = None, target_size: int | None = None) -> None:
        """Keep another share of every prompt from now on; nothing is compiled anew.

        Raises `PressError` for a bad value, or if the model was compiled without a press (or with ratio=0).
        """
        budget = Budget(ratio, target_size)
        if self._recipe.press is None and not budget.keeps_all:
            raise PressError(f"{budget}: this model was compiled without a press, so nothing can be dropped")
        if self._recipe.press is not None and not self._recipe.press.needs_budget:
            raise PressError(
                f"{budget}: {self._recipe.press.name} says itself what it keeps; compile with other options"
            )
        self._recipe = replace(self._recipe, budget=budget)

    def new_cache(self) -> CompressedCache:
        """An empty cache for this model."""
        return CompressedCache(self._layout, self._device)

    def generate(self, inputs: Tensor | None = None, *args: Any, **options: Any) -> Any:
        """`transformers.GenerationMixin.generate`; without `past_key_values` it begins with an empty cache.

        To go on with a returned cache give it as `past_key_values` with all tokens so far and the new ones.
        New tokens alone will do with the attention mask of the whole text.
        """
        ids, mask = options.get("input_ids", inputs), options.get("attention_mask")
        longer = ids is not None and mask is not None and mask.dim() == 2 and mask.shape[1] > ids.shape[1]
        if longer or options.get("prefill_chunk_size"):
            options["only_new_tokens"] = True
        if options.get("past_key_values") is None and options.get("use_cache", True):
            options["past_key_values"] = self.new_cache()
        base: Any = super()  # typed for transformers' own models only
        return base.generate(inputs, *args, **options)

    def _prompt_with_candidates(
        self, ids: Tensor, candidates: int, cache: CompressedCache, use_cache: bool | None
    ) -> CausalLMOutputWithPast:
        """More logits than the prompt's last: what they belong to follows the prompt (assisted decoding)."""
        before = self(input_ids=ids[:, :-candidates], past_key_values=cache)
        after: CausalLMOutputWithPast = self(input_ids=ids[:, -candidates:], past_key_values=cache, use_cache=use_cache)
        assert before.logits is not None and after.logits is not None
        after["logits"] = torch.cat([before.logits, after.logits], dim=1)
        return after

    def _read(self, ids: Tensor, cache: CompressedCache, question: int | None) -> Tensor:
        """The logits of a call, after the phase graph that the guard chose has run."""
        press = self._recipe.press
        prompt = Prompt(ids.shape[1], self._recipe.budget, 0, len(self._layout.layers), question)
        fits = press is None or press.fits(prompt)
        phase = choose_phase(prompt.tokens, cache.seen_tokens, fits=fits)
        if phase is Phase.PREFILL:
            return self._prefill_into(cache, ids, prompt, press.for_prompt(prompt) if press else None)
        if cache.seen_tokens == 0 and press is not None and not fits:
            log.info("a prompt of %d tokens is kept whole: %s needs %d", prompt.tokens, press.name, press.min_tokens)
        return self._append_to(phase, cache, ids)

    def _prefill_into(self, cache: CompressedCache, ids: Tensor, prompt: Prompt, press: Press | None) -> Tensor:
        prompts = [replace(prompt, layer=layer) for layer in range(prompt.layers)]
        sizes = [press.sizes(p) if press else {} for p in prompts]
        scalars = [press.scalars(p) if press else {} for p in prompts]
        entries = [
            size.get("budget", prompt.tokens) if layer.pressed else prompt.tokens
            for layer, size in zip(self._layout.layers, sizes, strict=True)
        ]
        cache.allocate(ids.shape[0], entries)
        graph = self._phase(Phase.PREFILL, press)
        given: dict[str, Tensor] = {}
        for port in graph.program.inputs:
            if port.role is Role.SIZE:
                given[port.name] = torch.empty(sizes[port.layer or 0][port.key], device=self._device)
            elif port.role is Role.SCALAR:
                given[port.name] = torch.tensor(scalars[port.layer or 0][port.key], device=self._device)
        outputs = self._run(graph, cache, ids, given)
        left: dict[Role, dict[int, Tensor]] = {Role.KEPT: {}, Role.COUNT: {}}
        for port, value in zip(graph.program.outputs, outputs, strict=True):
            if port.layer is not None and port.role in left:
                left[port.role][port.layer] = value
        kept = [left[Role.KEPT].get(layer) for layer in range(prompt.layers)]
        next_position = press.next_position(prompt) if press else prompt.tokens
        cache.begin(prompt.tokens, kept, entries, counts=left[Role.COUNT], next_position=next_position)
        self._note_prompt(cache)
        return outputs[0]

    def _append_to(self, phase: Phase, cache: CompressedCache, ids: Tensor) -> Tensor:
        batch, tokens = ids.shape
        first = cache.seen_tokens == 0
        if first:
            cache.allocate(batch, [tokens] * len(self._layout.layers))
        cache.reserve(tokens)
        logits = self._run(self._phase(phase), cache, ids, {})[0]
        cache.advance(tokens)
        if first:
            self._note_prompt(cache)
        return logits

    def _run(
        self, graph: PhaseGraph, cache: CompressedCache, ids: Tensor, given: dict[str, Tensor]
    ) -> tuple[Tensor, ...]:
        inputs = []
        for port in graph.program.inputs:
            match port.role:
                case Role.INPUT_IDS:
                    inputs.append(ids)
                case Role.POSITION_IDS:
                    start = cache.next_position
                    positions = torch.arange(start, start + ids.shape[1], device=self._device)
                    inputs.append(positions.repeat(ids.shape[0], 1))
                case Role.LENGTHS:
                    inputs.append(cache.lengths)
                case Role.KEYS | Role.VALUES:
                    assert port.layer is not None
                    inputs.append(cache.buffers(port.layer)[port.role is Role.VALUES])
                case _:
                    inputs.append(given[port.name])
        return graph.run(*inputs)

    def _phase(self, phase: Phase, press: Press | None = None) -> PhaseGraph:
        key = (phase, press)
        if key not in self._ready:
            recipe = self._recipe
            self._ready[key] = self._graphs.get(
                phase, press, recipe.layers, recipe.backend, recipe.mode, recipe.print_ir
            )
        return self._ready[key]

    # -- checking ----------------------------------------------------------------------------------------------

    def _checked_ids(self, input_ids: Tensor | None, unused: dict[str, Any]) -> Tensor:
        given = {name for name, value in unused.items() if value is not None and value is not False} - HARMLESS
        if given:
            hint = "; positions are counted from what the cache has seen" if "position_ids" in given else ""
            raise InputError(f"a compiled model does not take {', '.join(sorted(given))}{hint}")
        if not isinstance(input_ids, Tensor):
            found = "nothing" if input_ids is None else f"a {type(input_ids).__name__}"
        else:
            found = f"{input_ids.dtype} {tuple(input_ids.shape)}"
        if (
            not isinstance(input_ids, Tensor)
            or input_ids.dim() != 2
            or input_ids.shape[1] == 0
            or input_ids.dtype not in (torch.int64, torch.int32)
        ):
            raise InputError(f"input_ids must be token ids [batch, tokens] with at least one token, found {found}")
        if input_ids.device != self._device:
            raise InputError(f"input_ids lie on {input_ids.device}, the model was compiled on {self._device}")
        # A copy with the strides of its shape: those of a slice would be compiled for, and everything twice.
        return input_ids.to(torch.int64).clone(memory_format=torch.contiguous_format)

    def _check_mask(self, attention_mask: Tensor, ids: Tensor, cache: CompressedCache) -> None:
        rows, new = ids.shape
        if tuple(attention_mask.shape) not in ((rows, new), (rows, cache.get_seq_length() + new)):
            raise InputError(
                f"attention_mask must be [batch, tokens], found {tuple(attention_mask.shape)} for input_ids "
                f"{(rows, new)} behind {cache.get_seq_length()} tokens"
            )
        _refuse_padding(attention_mask)

    def _question(self, ids: Tensor, question: int | None, cache: CompressedCache) -> tuple[Tensor, int | None]:
        """The prompt without the delimiter in front of its question, and how many tokens follow it."""
        press = self._recipe.press
        if press is None or not press.needs_question:
            if question is not None:
                raise InputError(f"question_tokens={question}: {press.name if press else 'no press'} asks for none")
            return ids, None
        delimiter = getattr(press, "delimiter", None)
        if delimiter is not None and question is None:
            found = (ids == delimiter).nonzero().tolist()
            columns = {column for _, column in found}
            if len(found) == ids.shape[0] and len(columns) == 1:
                (column,) = columns
                cache.note_removed(1)
                ids = torch.cat([ids[:, :column], ids[:, column + 1 :]], dim=1)
                question = ids.shape[1] - column
            elif found:
                raise InputError(
                    f"the delimiter {delimiter} stands at (row, column) {found}, expected once in each row, in one "
                    "column; give one context and one question"
                )
        if question is None or not 0 < question < ids.shape[1]:
            raise InputError(
                f"{press.name} must know where the question begins, found {question} question tokens in "
                f"{ids.shape[1]}: put the delimiter of compile(..., delimiter=id) between context and question, or "
                "say question_tokens=n, the number of tokens at the end that ask"
            )
        return ids, question

    def _checked_cache(self, cache: CompressedCache | None, ids: Tensor) -> CompressedCache:
        if cache is None:
            cache = self.new_cache()
        if not isinstance(cache, CompressedCache):
            raise CacheError(
                f"past_key_values is a {type(cache).__name__}; a compiled model goes on with a CompressedCache, as "
                "prefill() and generate(..., return_dict_in_generate=True) return it"
            )
        if cache.layout.model_id != self._layout.model_id or cache.device != self._device:
            raise CacheError(
                f"the cache belongs to another model (cache {cache.layout.model_id} on {cache.device}, "
                f"this model {self._layout.model_id} on {self._device}); prefill the text with this one"
            )
        if cache.seen_tokens and cache.batch_size != ids.shape[0]:
            raise CacheError(
                f"the cache holds {cache.batch_size} rows, input_ids {ids.shape[0]}; "
                "cache.batch_repeat_interleave(n) repeats rows"
            )
        total = cache.seen_tokens + ids.shape[1]
        if total > self._recipe.max_tokens:
            raise InputError(
                f"the text is {total} tokens long, the model's positions end at {self._recipe.max_tokens}; "
                "shorten the text (compression saves memory, it does not add positions)"
            )
        return cache

    # -- looking at it -----------------------------------------------------------------------------------------

    def graph(self, phase: Phase | str = Phase.PREFILL) -> KVProgram:
        """The program of one phase, as it runs."""
        wanted = _as_phase(phase)
        return self._phase(wanted, self._example_press() if wanted is Phase.PREFILL else None).program

    def _example_press(self) -> Press | None:
        """The press that handles prompts of a length that suits it; for others it may be another one."""
        press = self._recipe.press
        if press is None:
            return None
        tokens = press.example_tokens
        layers = len(self._layout.layers)
        return press.for_prompt(Prompt(tokens, Budget(ratio=0.5), 0, layers, question=min(7, tokens - 1)))

    def print_graph(self, phase: Phase | str = Phase.PREFILL) -> str:
        """Canonical text of the graph of one phase; equal in every process."""
        return graph_text(self.graph(phase))

    def graph_diff(self, layer: int | None = 0, phase: Phase | str = Phase.PREFILL, *, only: str | None = None) -> str:
        """What the passes changed in one layer (`None`: outside all layers), as lines with + and -.

        `only` names one pass, e.g. "splice-press"; otherwise all of them behind the cut into phases.
        """
        steps = phase_passes(_as_phase(phase), self._example_press(), self._recipe.layers)
        names = [step.name for step in steps]
        if only is not None and only not in names:
            raise ValueError(f"there is no pass {only!r} in {phase}; its passes are {', '.join(names)}")
        if not 0 <= (layer or 0) < self._graphs.located.layer_count:
            raise ValueError(f"there is no layer {layer}; the model has {self._graphs.located.layer_count}")
        first, last = (1, len(steps)) if only is None else (names.index(only), names.index(only) + 1)
        before = PassManager(steps[:first]).run(self._graphs.located)
        return graph_diff(before, PassManager(steps[first:last]).run(before), layer)

    def report(self) -> Report:
        """The passes with matches, nodes and time, and what is kept per layer of the last prompt."""
        passes = {"capture": self._capture_records}
        passes |= {phase.value: list(graph.records) for (phase, _), graph in self._ready.items()}
        seen, kept, size = self._last_prompt
        press = repr(self._recipe.press) if self._recipe.press else "none"
        notes = self._graphs.located.notes
        return Report(passes, press, str(self._recipe.budget), seen, kept, size, notes)

    def _note_prompt(self, cache: CompressedCache) -> None:
        kept = [cache.kept(layer) for layer in range(len(cache))]
        self._last_prompt = (cache.seen_tokens, kept, cache.nbytes)

    # -- what transformers asks for ----------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    def can_generate(self) -> bool:
        return True

    def is_remote_code(self) -> bool:
        return False

    def get_experts_implementation(self) -> dict[str, str]:
        return {}

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        past_key_values: CompressedCache | None = None,
        attention_mask: Tensor | None = None,
        next_sequence_length: int | None = None,
        only_new_tokens: bool = False,
        use_cache: bool | None = None,
        question_tokens: int | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """Cut off what the cache has seen. The padding mask is checked where tokens enter, not at every step."""
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        given = input_ids.shape[1]
        if next_sequence_length is not None:
            new = next_sequence_length
        elif attention_mask is not None:
            new = attention_mask.shape[1] - seen
        else:
            new = given if only_new_tokens else given - seen
        if not 0 < new <= given:
            raise InputError(
                f"the cache has seen {seen} tokens, input_ids hold {given}: give all tokens so far and the new ones"
            )
        if attention_mask is not None and new > 1:
            _refuse_padding(attention_mask)
        kept = {name: value for name, value in options.items() if name not in ("labels", *HARMLESS)}
        if seen == 0:
            kept["question_tokens"] = question_tokens
        return {"input_ids": input_ids[:, -new:], "past_key_values": past_key_values, "use_cache": use_cache, **kept}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "CompiledModel":
        probe = fn(torch.empty(0, dtype=self._dtype, device=self._device))
        if probe.device != self._device or probe.dtype != self._dtype:
            raise RuntimeError(
                f"a compiled model stays on {self._device} in {self._dtype}: its graph is made for them. "
                "Move or cast the original model and compile that"
            )
        return self


def _refuse_padding(attention_mask: Tensor) -> None:
    if attention_mask.dim() != 2:
        raise InputError(f"attention_mask must be [batch, tokens], found {tuple(attention_mask.shape)}")
    padded = (attention_mask == 0).any(dim=1)
    if bool(padded.any()):
        rows = padded.nonzero().flatten().tolist()
        raise InputError(
            f"attention_mask has padding in rows {rows}: padded batches cannot be compressed; "
            "give prompts of equal length in one batch, or one prompt at a time"
        )


def _as_phase(phase: Phase | str) -> Phase:
    try:
        return Phase(phase)
    except ValueError:
        raise ValueError(f"there is no phase {phase!r}; phases are {', '.join(p.value for p in Phase)}") from None
