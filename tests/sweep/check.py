"""Compile one architecture with several presses and compare what it says with the oracle."""

import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

import kvpass
from kvpass.errors import MissingTapError, PressError, UnsupportedModelError
from kvpass.inspection.architectures import Architecture
from kvpass.ir.attention_site import AttentionSite, attention_sites

from .oracle import eager_logits, hidden_from, logits_without
from .weights import sweep_model

T = TypeVar("T")

PRESSES: dict[str, str | None] = {
    "none": None,
    "knorm": "knorm",
    "snapkv": "snapkv(window_size=4)",
    "expected_attention": "expected_attention",
    "streaming_llm": "streaming_llm",
}
RATIO = 0.5
PROMPTS = (37, 61)  # not the length of the example that is exported; windows of 16 bite
QUESTION, STEPS, BATCH = 5, 8, 2
TOLERANCE = 1e-4  # of the greatest logit
LEAST_EFFECT = 100 * TOLERANCE  # what hiding the lost pairs must change, or the comparison would show nothing


class Outcome(Enum):
    EQUAL = "equal"
    REFUSED = "refused"
    FAILED = "failed"


@dataclass(frozen=True)
class Verdict:
    """What became of one press."""

    outcome: Outcome
    reason: str = ""
    worst: float = 0.0  # greatest difference from the oracle, relative to the greatest logit
    detail: str = ""


@dataclass
class Result:
    """What became of one architecture."""

    name: str
    model_class: str
    sites: int = 0
    masks: str = ""
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def outcome(self) -> Outcome:
        """The worst of all presses."""
        found = {verdict.outcome for verdict in self.verdicts.values()}
        order = (Outcome.FAILED, Outcome.REFUSED, Outcome.EQUAL)
        return next((outcome for outcome in order if outcome in found), Outcome.FAILED)


class Mismatch(AssertionError):
    """kvpass answered, and the answer is wrong."""


def check(architecture: Architecture, presses: Sequence[str] = tuple(PRESSES)) -> Result:
    """Everything about one architecture. What it raises is an error of the harness, not of kvpass."""
    result = Result(architecture.name, architecture.model_class.__name__)
    model = sweep_model(architecture)
    ids = _token_ids(architecture, max(PROMPTS) + QUESTION + STEPS)
    before = eager_logits(model, ids)
    everything = logits_without(model, ids, None)
    _compare("the oracle that hides nothing", everything, before)

    captured = _judged(lambda: kvpass.capture_model(model))
    if isinstance(captured, Verdict):
        result.verdicts = dict.fromkeys(presses, captured)
    else:
        sites = attention_sites(captured.graphs.located)
        result.sites, result.masks = len(sites), _mask_kinds(sites)
        for press in presses:
            worst = _judged(partial(_run, model, captured, press, ids))
            result.verdicts[press] = worst if isinstance(worst, Verdict) else Verdict(Outcome.EQUAL, worst=worst)
    if not torch.equal(eager_logits(model, ids), before):
        changed = Verdict(Outcome.FAILED, "compiling changed the eager answers of the live model")
        result.verdicts = dict.fromkeys(presses, changed)
    return result


def _judged(attempt: Callable[[], T]) -> T | Verdict:
    try:
        return attempt()
    except (UnsupportedModelError, MissingTapError) as error:
        told = "".join(traceback.format_exception(error))
        return Verdict(Outcome.REFUSED, _first_sentence(str(error)), detail=told)
    except Exception as error:
        return failure(error)


def failure(error: Exception, whose: str = "") -> Verdict:
    """What an error that is no refusal means."""
    where = "" if isinstance(error, Mismatch) else f" ({_place(error)})"
    reason = f"{whose}{type(error).__name__}: {_first_sentence(str(error))}{where}"
    return Verdict(Outcome.FAILED, reason, detail="".join(traceback.format_exception(error)))


def _run(model: PreTrainedModel, captured: kvpass.CapturedModel, press: str, text: Tensor) -> float:
    """Greatest relative difference over all prompts, questions and steps."""
    name = PRESSES[press]
    sites = attention_sites(captured.graphs.located)
    try:
        compiled = kvpass.compile(captured, press=name, ratio=RATIO if name else None, backend="eager")
    except PressError as error:
        if any(site.pressable for site in sites):
            raise
        raise UnsupportedModelError(str(error)) from error  # windows everywhere: a press is rightly refused
    worst = 0.0
    for prompt in PROMPTS:
        ids = text[:, : prompt + QUESTION + STEPS]
        cache = compiled.new_cache()
        said = [_read(compiled, cache, ids[:, :prompt])]
        kept = [cache.positions(layer) for layer in range(len(sites))]
        for site, positions in zip(sites, kept, strict=True):
            _check_positions(press, site, positions, prompt)
        said += [_read(compiled, cache, part) for part in ids[:, prompt:].split([QUESTION, *[1] * STEPS], dim=1)]

        # Layers with a window hide what they have lost by their own mask.
        pressed = [not site.bounded and name is not None for site in sites]
        hidden = [hidden_from(p, prompt) if is_pressed else None for p, is_pressed in zip(kept, pressed, strict=True)]
        expected = logits_without(model, ids, hidden)
        worst = max(worst, _compare(f"{prompt} tokens", torch.cat(said, 1), expected[:, prompt - 1 :]))
        if any(pressed):
            _check_effect(expected, logits_without(model, ids, None), prompt)
    return worst


def _read(compiled: kvpass.CompiledModel, cache: kvpass.CompressedCache, ids: Tensor) -> Tensor:
    logits = compiled(input_ids=ids, past_key_values=cache).logits
    assert isinstance(logits, Tensor)
    return logits


def _compare(what: str, found: Tensor, expected: Tensor) -> float:
    """The relative difference. Raises `Mismatch` if it is too large."""
    if found.shape != expected.shape:
        raise Mismatch(f"{what}: logits {tuple(found.shape)}, expected {tuple(expected.shape)}")
    scale = expected.abs().max()
    off = (found - expected).abs().amax((0, 2)) / scale
    worst = float(off.max())
    if not worst <= TOLERANCE:
        first = int((~(off <= TOLERANCE)).nonzero()[0])
        parts = ("prefill", *("question",) * QUESTION, *("step",) * STEPS)
        where = f" from {parts[first]} on" if len(off) == len(parts) else ""
        raise Mismatch(f"{what}: logits off by {worst:.1e} of the greatest{where}")
    return worst


def _check_effect(expected: Tensor, complete: Tensor, prompt: int) -> None:
    effect = float((expected - complete)[:, prompt:].abs().max() / complete.abs().max())
    if effect < LEAST_EFFECT:
        raise Mismatch(f"{prompt} tokens: losing pairs changes no more than {effect:.1e}, so nothing was tested")


def _check_positions(press: str, site: AttentionSite, positions: Tensor, prompt: int) -> None:
    """Fail unless a layer kept as many pairs as it should, in order, and those that the press never drops."""
    where = f"{prompt} tokens, layer {site.layer}"
    if bool((positions.diff(dim=-1) <= 0).any()) or int(positions.min()) < 0 or int(positions.max()) >= prompt:
        raise Mismatch(f"{where}: positions are not ascending within the prompt")
    found, text = positions.shape[-1], torch.arange(prompt)
    if site.bounded:  # the whole prompt, or the part of it that later tokens can see
        if bool((positions != text[prompt - found :]).any()):
            raise Mismatch(f"{where}: a layer with a window lost tokens inside of it")
        return
    count = max(1, int(prompt * (1 - RATIO))) if PRESSES[press] else prompt
    if found != count:
        raise Mismatch(f"{where}: {found} pairs kept, expected {count}")
    always = {
        "none": text,
        "snapkv": text[-4:],
        "expected_attention": text[:4],
        "streaming_llm": torch.cat([text[:4], text[prompt - (count - 4) :]]),
    }.get(press, text[:0])
    if not bool((positions[..., None] == always).any(-2).all()):
        raise Mismatch(f"{where}: the press dropped what it always keeps")


def _mask_kinds(sites: Sequence[AttentionSite]) -> str:
    kinds = Counter(str(site.mask) for site in sites)
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))


def _token_ids(architecture: Architecture, tokens: int) -> Tensor:
    size = int(architecture.config().get_text_config(decoder=True).vocab_size)
    return torch.randint(3, size, (BATCH, tokens), generator=torch.Generator().manual_seed(1))


def _first_sentence(text: str) -> str:
    line = " ".join(text.split())
    end = next((i for i in range(len(line)) if line[i : i + 2] in (". ", "; ") and i > 20), len(line))
    return line[:end][:200]


def _place(error: Exception) -> str:
    """The innermost line of kvpass or its passes in the traceback of an error."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "kvpass" in Path(f.filename).parts]
    frames = frames or traceback.extract_tb(error.__traceback__)[-1:]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
