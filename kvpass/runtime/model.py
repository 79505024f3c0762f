"""The compiled model: generates as any transformers model does, over a compressed cache."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from kvpass.backends import TENSORRT
from kvpass.budget import Budget, Prompt
from kvpass.errors import CacheError, InputError, PackageError, PressError
from kvpass.ir.form import Phase
from kvpass.ir.printer import graph_diff, graph_text
from kvpass.ir.program import KVProgram
from kvpass.pass_manager import PassManager, PassRecord
from kvpass.press import Press
from kvpass.runtime.cache import CompressedCache
from kvpass.runtime.cache_name import CACHE, given_cache
from kvpass.runtime.execution import Execution, Recipe
from kvpass.runtime.inputs import HARMLESS, checked_mask, checked_positions, checked_tokens, prompt_rows
from kvpass.runtime.layout import CacheLayout
from kvpass.runtime.phases import PhaseGraphs
from kvpass.runtime.report import Report
from kvpass.runtime.rows import Rows, without_padding


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
        self._capture_records = list(capture_records)
        self._last_prompt: tuple[int, list[int], int] = (0, [], 0)
        probe = next(self.weights.parameters())
        self._device, self._dtype = probe.device, probe.dtype
        self._execution = Execution(graphs, layout, recipe, probe.device)

    # -- running -----------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: CompressedCache | None = None,
        logits_to_keep: int = 0,
        use_cache: bool | None = None,
        question_tokens: int | None = None,
        inputs_embeds: Tensor | None = None,
        positions: Tensor | None = None,
        cache: CompressedCache | None = None,
        **unused: Any,
    ) -> CausalLMOutputWithPast:
        """Read `input_ids` i64[B, S], or `inputs_embeds` [B, S, D_model], behind what the cache has seen.

        The cache comes as `past_key_values` or, as transformers has it since 5.24, as `cache`.
        Logits are [B, 1, V] after the first prompt (its last token), [B, S, V] for tokens appended to a cache.
        `logits_to_keep=n` gives the last n; with a first prompt its last n - 1 tokens count as appended to it.
        `question_tokens`: how many tokens at the end of the prompt ask about the rest, for a press like finch.
        `inputs_embeds`: what the model's `get_input_embeddings()` returns for ids, with anything else (images, soft
        prompts) in the places that stand for it. `positions`: theirs, i64[B, S], or i64[axes, B, S] where the model has
        one for time, height and width each; counted if not given. What follows goes on behind the greatest.
        Raises `InputError` for what cannot be served, `CacheError` for a cache of another model or size.
        """
        tokens = checked_tokens(input_ids, inputs_embeds, self._device, self._dtype, unused)
        places = checked_positions(positions, tokens)
        cache = self._checked_cache(given_cache(past_key_values, cache), tokens)
        mask = None if attention_mask is None else checked_mask(attention_mask, tokens, cache.get_seq_length())
        first, columns = cache.seen_tokens == 0, tokens.shape[1]
        if first and min(logits_to_keep, columns) > 1:
            return self._prompt_with_candidates(
                tokens, mask, places, min(logits_to_keep, columns) - 1, cache, use_cache
            )
        press = self._recipe.press
        if first:
            rows = prompt_rows(tokens, mask, places, press, question_tokens)
        else:
            rows = without_padding(tokens, mask, places)
        self._check_length(cache, rows)
        with torch.no_grad():
            logits = (self._execution.prefill if first else self._execution.append)(cache, rows, columns)
        if first:
            kept = [cache.kept(layer) for layer in range(len(cache))]
            self._last_prompt = (cache.seen_tokens, kept, cache.nbytes)
        if logits_to_keep:
            logits = logits[:, -logits_to_keep:]
        held: dict[str, Any] = {CACHE: None if use_cache is False else cache}
        return CausalLMOutputWithPast(logits=logits, **held)

    def prefill(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **options: Any
    ) -> CausalLMOutputWithPast:
        """Read a prompt i64[B, S] into a new cache: `logits` [B, 1, V] of its last token, `past_key_values`.

        options: `inputs_embeds` instead of ids, `positions`, `question_tokens`, as for a call.
        """
        result: CausalLMOutputWithPast = self(input_ids=input_ids, attention_mask=attention_mask, **options)
        return result

    def set_budget(self, *, ratio: float | None = None, target_size: int | None = None) -> None:
        """Keep another share of every prompt from now on; nothing is compiled anew, but for TensorRT.

        Raises `PressError` for a bad value, or if the model was compiled without a press (or with ratio=0).
        """
        budget = Budget(ratio, target_size)
        if self._recipe.press is None and not budget.keeps_all:
            raise PressError(f"{budget}: this model was compiled without a press, so nothing can be dropped")
        if self._recipe.press is not None and not self._recipe.press.needs_budget:
            raise PressError(
                f"{budget}: {self._recipe.press.name} says itself what it keeps; compile with other options"
            )
        self._execution.recipe = replace(self._recipe, budget=budget)
        if self._recipe.backend == TENSORRT:
            self._execution.ready.clear()  # an engine counts by itself

    @property
    def _recipe(self) -> Recipe:
        return self._execution.recipe

    @property
    def _located(self) -> KVProgram:
        return self._execution.graphs.located

    def save(self, path: str | Path) -> None:
        """Write a new folder that `kvpass.load` reads: weights, the graphs of all phases, configs, the options.

        Raises `PackageError` if the path exists or cannot be written, or the graph has no form in a file.
        """
        from kvpass.runtime.model_files import save_model

        save_model(self, path)

    def export(self, path: str | Path, format: str = "exported_program", **options: Any) -> None:
        """Write the phases as programs that run without kvpass; `kvpass.load` reads them back, too.

        format: "aot_inductor": one .pt2 file, compiled, the weights once; for C++ and Python. "exported_program": a
            folder with one file for `torch.export.load` per phase. "onnx": a folder with one model per phase over one
            file of weights, for ONNX Runtime; float32 or float16. "tensorrt": a folder
            with one engine per phase.
        for_tensorrt: of "onnx", True writes what TensorRT's ONNX parser takes; such a package serves prompts of
            up to max_tokens with TopK layers of as many, and ONNX Runtime runs it, too, unless it is bfloat16.
        guard: "in_graph" makes one program of prefill and extend, in which `torch.cond` decides, over caches of
            `capacity` slots (max_tokens by default), for runtimes with a single entry point. It cannot take fewer ids
            than the press needs: single tokens come with padding, and cost as much as all of them.
        batch_size: rows, 1 by default; fixed. max_tokens: the longest prompt, by default what the model can read.
        progress: a function of a text, called before each step. profile, targets: of "tensorrt", what engines are
            built for, see `kvpass.backends.tensorrt.write`.

        The budget is part of the graphs: they count what is kept themselves. Raises `PackageError` for an unknown
        format, if the path exists or cannot be written, or a press asks for more than token ids.
        """
        from kvpass.deployment.export import export_model

        export_model(self, path, format, **options)

    def new_cache(self) -> CompressedCache:
        """An empty cache for this model."""
        return CompressedCache(self._execution.layout, self._device)

    def generate(self, inputs: Tensor | None = None, *args: Any, **options: Any) -> Any:
        """`transformers.GenerationMixin.generate`; without `past_key_values` it begins with an empty cache.

        To go on with a returned cache give it as `past_key_values` with all tokens so far and the new ones.
        New tokens alone will do with the attention mask of the whole text. A prompt of `inputs_embeds` may bring its
        `positions`; what is returned are the new tokens then, as transformers has it.
        """
        ids, mask = options.get("input_ids", inputs), options.get("attention_mask")
        longer = ids is not None and mask is not None and mask.dim() == 2 and mask.shape[1] > ids.shape[1]
        if longer or options.get("prefill_chunk_size"):
            options["only_new_tokens"] = True
        cache = given_cache(options.pop("past_key_values", None), options.pop("cache", None))
        if cache is not None or options.get("use_cache", True):
            options[CACHE] = self.new_cache() if cache is None else cache
        if options.get("positions") is not None and options["positions"].dim() == 3:
            options["positions"] = options["positions"].transpose(0, 1)  # rows first, as transformers repeats them
        base: Any = super()  # typed for transformers' own models only
        return base.generate(inputs, *args, **options)

    def _prompt_with_candidates(
        self,
        tokens: Tensor,
        mask: Tensor | None,
        places: Tensor | None,
        candidates: int,
        cache: CompressedCache,
        use_cache: bool | None,
    ) -> CausalLMOutputWithPast:
        """More logits than the prompt's last: what they belong to follows the prompt (assisted decoding)."""

        def part(where: slice) -> dict[str, Any]:
            return {
                "input_ids" if tokens.dim() == 2 else "inputs_embeds": tokens[:, where],
                "attention_mask": None if mask is None else mask[:, where],
                "positions": None if places is None else places[:, :, where],
            }

        before = self(**part(slice(None, -candidates)), past_key_values=cache)
        after: CausalLMOutputWithPast = self(
            **part(slice(-candidates, None)), past_key_values=cache, use_cache=use_cache
        )
        assert before.logits is not None and after.logits is not None
        after["logits"] = torch.cat([before.logits, after.logits], dim=1)
        return after

    # -- checking ----------------------------------------------------------------------------------------------

    def _checked_cache(self, cache: CompressedCache | None, tokens: Tensor) -> CompressedCache:
        if cache is None:
            cache = self.new_cache()
        if not isinstance(cache, CompressedCache):
            raise CacheError(
                f"past_key_values is a {type(cache).__name__}; a compiled model goes on with a CompressedCache, as "
                "prefill() and generate(..., return_dict_in_generate=True) return it"
            )
        model_id = self._execution.layout.model_id
        if cache.layout.model_id != model_id or cache.device != self._device:
            raise CacheError(
                f"the cache belongs to another model (cache {cache.layout.model_id} on {cache.device}, "
                f"this model {model_id} on {self._device}); prefill the text with this one"
            )
        if cache.seen_tokens and cache.batch_size != tokens.shape[0]:
            raise CacheError(
                f"the cache holds {cache.batch_size} rows, the new tokens {tokens.shape[0]}; "
                "cache.batch_repeat_interleave(n) repeats rows"
            )
        return cache

    def _check_length(self, cache: CompressedCache, rows: Rows) -> None:
        before = cache.seen_by_row or (0,) * len(rows.counts)
        counted = [seen + new for seen, new in zip(before, rows.counts, strict=True)]
        total = max(*counted, *(rows.next_positions or [0]))
        if total > self._recipe.max_tokens:
            raise InputError(
                f"the text is {total} tokens long, the model's positions end at {self._recipe.max_tokens}; "
                "shorten the text (compression saves memory, it does not add positions)"
            )

    # -- looking at it -----------------------------------------------------------------------------------------

    def graph(self, phase: Phase | str = Phase.PREFILL) -> KVProgram:
        """The program of one phase, as it runs."""
        wanted = _as_phase(phase)
        return self._execution.phase(wanted, self._example_press() if wanted is Phase.PREFILL else None).program

    def _example_press(self) -> Press | None:
        """The press that handles prompts of a length that suits it; for others it may be another one."""
        press = self._recipe.press
        if press is None:
            return None
        tokens = press.example_tokens
        layers = self._located.layer_count
        return press.for_prompt(Prompt(tokens, Budget(ratio=0.5), 0, layers, question=min(7, tokens - 1)))

    def print_graph(self, phase: Phase | str = Phase.PREFILL) -> str:
        """Canonical text of the graph of one phase; equal in every process."""
        return graph_text(self.graph(phase))

    def graph_diff(self, layer: int | None = 0, phase: Phase | str = Phase.PREFILL, *, only: str | None = None) -> str:
        """What the passes changed in one layer (`None`: outside all layers), as lines with + and -.

        `only` names one pass, e.g. "splice-press"; otherwise all of them behind the cut into phases.
        """
        steps = self._execution.passes(_as_phase(phase), self._example_press())
        names = [step.name for step in steps]
        if only is not None and only not in names:
            raise ValueError(f"there is no pass {only!r} in {phase}; its passes are {', '.join(names)}")
        if not 0 <= (layer or 0) < self._located.layer_count:
            raise ValueError(f"there is no layer {layer}; the model has {self._located.layer_count}")
        first, last = (1, len(steps)) if only is None else (names.index(only), names.index(only) + 1)
        before = PassManager(steps[:first]).run(self._located)
        return graph_diff(before, PassManager(steps[first:last]).run(before), layer)

    @overload
    def report(self) -> Report: ...

    @overload
    def report(self, format: str) -> Any: ...

    def report(self, format: str | None = None) -> Any:
        """The passes with matches, nodes and time, and what is kept per layer of the last prompt.

        With format "tensorrt", what TensorRT would make of each phase: operators, how many, what converts them, and
        what would fall back to torch, for which `export` refuses a model. Raises `PackageError` if it is not installed.
        """
        if format is not None:
            if format != "tensorrt":
                raise PackageError(f"there is no report of {format!r}; known is 'tensorrt'")
            from kvpass.deployment.export import report_for_tensorrt

            return report_for_tensorrt(self)
        passes = {"capture": self._capture_records}
        passes |= {phase.value: list(graph.records) for (phase, *_), graph in self._execution.ready.items()}
        seen, kept, size = self._last_prompt
        press = repr(self._recipe.press) if self._recipe.press else "none"
        notes = self._located.notes
        return Report(passes, press, str(self._recipe.budget), seen, kept, size, notes)

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

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: CompressedCache | None = None,
        attention_mask: Tensor | None = None,
        next_sequence_length: int | None = None,
        only_new_tokens: bool = False,
        use_cache: bool | None = None,
        question_tokens: int | None = None,
        inputs_embeds: Tensor | None = None,
        positions: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        cache: CompressedCache | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """Cut off what the cache has seen. A padding mask is looked at where tokens enter, not at every step."""
        cache = given_cache(past_key_values, cache)
        seen = cache.get_seq_length() if cache is not None else 0
        embedded = inputs_embeds is not None and seen < inputs_embeds.shape[1]
        tokens = inputs_embeds if inputs_embeds is not None and embedded else input_ids
        given = tokens.shape[1]
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
        kept = {name: value for name, value in options.items() if name not in ("labels", *HARMLESS)}
        if seen == 0:
            kept |= {"question_tokens": question_tokens, "token_type_ids": token_type_ids}
        if embedded and positions is not None:
            kept["positions"] = positions.transpose(0, 1) if positions.dim() == 3 else positions
        if attention_mask is not None and new > 1:
            kept["attention_mask"] = attention_mask[:, -new:]
        name = "inputs_embeds" if embedded else "input_ids"
        return {name: tokens[:, -new:], CACHE: cache, "use_cache": use_cache, **kept}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "CompiledModel":
        probe = fn(torch.empty(0, dtype=self._dtype, device=self._device))
        if probe.device != self._device or probe.dtype != self._dtype:
            raise RuntimeError(
                f"a compiled model stays on {self._device} in {self._dtype}: its graph is made for them. "
                "Move or cast the original model and compile that"
            )
        return self


def _as_phase(phase: Phase | str) -> Phase:
    try:
        return Phase(phase)
    except ValueError:
        raise ValueError(f"there is no phase {phase!r}; phases are {', '.join(p.value for p in Phase)}") from None
