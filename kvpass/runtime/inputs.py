"""What a compiled model accepts, and what it says to the rest."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvpass.errors import InputError
from kvpass.press import Press
from kvpass.runtime.rows import Rows, without_padding

# Arguments that transformers hands to every model and that say nothing here.
HARMLESS = frozenset({"cache_position", "return_dict", "use_cache", "token_type_ids", "is_first_iteration"})


def checked_tokens(
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    device: torch.device,
    dtype: torch.dtype,
    unused: dict[str, Any],
) -> Tensor:
    """What the graphs read: token ids i64[B, S], or embeddings [B, S, D_model] of `dtype`."""
    given = {name for name, value in unused.items() if value is not None and value is not False} - HARMLESS
    if given:
        hint = ""
        if "position_ids" in given:
            hint = "; positions are counted from what the cache has seen, those of inputs_embeds come as positions="
        raise InputError(f"a compiled model does not take {', '.join(sorted(given))}{hint}")
    kinds_of_tokens = unused.get("token_type_ids")
    if isinstance(kinds_of_tokens, Tensor) and kinds_of_tokens.shape[1] > 1 and bool(kinds_of_tokens.any()):
        raise InputError(
            "token_type_ids mark tokens that attend to one another in both directions (images of Gemma 3); the graph "
            "attends causally. Leave them out if that will do"
        )
    if inputs_embeds is None:
        kinds = (torch.int64, torch.int32)
        ids = _checked(input_ids, "input_ids", "token ids [batch, tokens]", 2, kinds, device)
        return ids.to(torch.int64)
    if input_ids is not None:
        raise InputError("both input_ids and inputs_embeds were given; a graph reads one of them")
    return _checked(inputs_embeds, "inputs_embeds", f"{dtype} [batch, tokens, width]", 3, (dtype,), device)


def _checked(
    given: Tensor | None,
    name: str,
    expected: str,
    dims: int,
    kinds: tuple[torch.dtype, ...],
    device: torch.device,
) -> Tensor:
    found = "nothing" if given is None else f"a {type(given).__name__}"
    if isinstance(given, Tensor):
        found = f"{given.dtype} {tuple(given.shape)}"
    if not isinstance(given, Tensor) or given.dim() != dims or given.shape[1] == 0 or given.dtype not in kinds:
        raise InputError(f"{name} must be {expected} with at least one token, found {found}")
    if given.device != device:
        raise InputError(f"{name} lie on {given.device}, the model was compiled on {device}")
    # A copy with the strides of its shape: those of a slice would be compiled for, and everything twice.
    return given.clone(memory_format=torch.contiguous_format)


def checked_positions(positions: Tensor | None, tokens: Tensor) -> Tensor | None:
    """The positions of embeddings, i64[axes, B, S]."""
    if positions is None:
        return None
    if tokens.dim() == 2:
        raise InputError("positions= come with inputs_embeds; those of input_ids are counted")
    if positions.dim() not in (2, 3) or positions.shape[-2:] != tokens.shape[:2] or positions.is_floating_point():
        raise InputError(
            f"positions must be whole numbers [batch, tokens] or [axes, batch, tokens] for inputs_embeds "
            f"{tuple(tokens.shape)}, found {positions.dtype} {tuple(positions.shape)}"
        )
    return positions.to(tokens.device, torch.int64).reshape(-1, *positions.shape[-2:])


def checked_mask(attention_mask: Tensor, tokens: Tensor, seen: int) -> Tensor:
    """The padding mask of the new tokens alone, [B, S]; the whole text's is accepted too."""
    rows, new = tokens.shape[:2]
    if tuple(attention_mask.shape) not in ((rows, new), (rows, seen + new)):
        raise InputError(
            f"attention_mask must be [batch, tokens], found {tuple(attention_mask.shape)} for tokens "
            f"{(rows, new)} behind {seen} tokens"
        )
    return attention_mask[:, -new:].to(tokens.device)


def prompt_rows(
    tokens: Tensor, mask: Tensor | None, positions: Tensor | None, press: Press | None, question: int | None
) -> Rows:
    """The rows of a first prompt, without padding and delimiters, each with the length of its question."""
    if press is None or not press.needs_question:
        if question is not None:
            raise InputError(f"question_tokens={question}: {press.name if press else 'no press'} asks for none")
        return without_padding(tokens, mask, positions)
    delimiter = getattr(press, "delimiter", None)
    questions: list[int | None] = [question] * tokens.shape[0]
    if delimiter is not None and question is None and tokens.dim() == 2:
        real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask != 0
        marks = (tokens == delimiter) & real
        found = marks.nonzero().tolist()
        if [row for row, _ in found] == list(range(tokens.shape[0])):
            behind = (marks.cumsum(dim=1) > 0) & real & ~marks
            questions = behind.sum(dim=1).tolist()
            mask = real & ~marks
        elif found:
            raise InputError(
                f"the delimiter {delimiter} stands at (row, column) {found}, expected once in each row; give one "
                "context and one question"
            )
    rows = without_padding(tokens, mask, positions)
    for asked, count in zip(questions, rows.counts, strict=True):
        if asked is None or not 0 < asked < count:
            raise InputError(
                f"{press.name} must know where the question begins, found {asked} question tokens in {count}: put "
                "the delimiter of compile(..., delimiter=id) between context and question, or say "
                "question_tokens=n, the number of tokens at the end that ask"
            )
    return replace(rows, questions=tuple(questions))
