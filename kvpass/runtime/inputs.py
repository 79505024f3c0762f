"""What a compiled model accepts, and what it says to the rest."""

from typing import Any

import torch
from torch import Tensor

from kvpass.errors import InputError
from kvpass.press import Press
from kvpass.runtime.rows import Rows, without_padding

# Arguments that transformers hands to every model and that say nothing here.
HARMLESS = frozenset({"cache_position", "return_dict", "use_cache", "token_type_ids", "is_first_iteration"})


def checked_ids(input_ids: Tensor | None, device: torch.device, unused: dict[str, Any]) -> Tensor:
    """Token ids as the graphs read them, i64[B, S]."""
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
    if input_ids.device != device:
        raise InputError(f"input_ids lie on {input_ids.device}, the model was compiled on {device}")
    # A copy with the strides of its shape: those of a slice would be compiled for, and everything twice.
    return input_ids.to(torch.int64).clone(memory_format=torch.contiguous_format)


def checked_mask(attention_mask: Tensor, ids: Tensor, seen: int) -> Tensor:
    """The padding mask of the new tokens alone, [B, S]; the whole text's is accepted too."""
    rows, new = ids.shape
    if tuple(attention_mask.shape) not in ((rows, new), (rows, seen + new)):
        raise InputError(
            f"attention_mask must be [batch, tokens], found {tuple(attention_mask.shape)} for input_ids "
            f"{(rows, new)} behind {seen} tokens"
        )
    return attention_mask[:, -new:].to(ids.device)


def prompt_rows(ids: Tensor, mask: Tensor | None, press: Press | None, question: int | None) -> Rows:
    """The rows of a first prompt, without padding and delimiters, each with the length of its question."""
    if press is None or not press.needs_question:
        if question is not None:
            raise InputError(f"question_tokens={question}: {press.name if press else 'no press'} asks for none")
        return without_padding(ids, mask)
    delimiter = getattr(press, "delimiter", None)
    questions: list[int | None] = [question] * ids.shape[0]
    if delimiter is not None and question is None:
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask != 0
        marks = (ids == delimiter) & real
        found = marks.nonzero().tolist()
        if [row for row, _ in found] == list(range(ids.shape[0])):
            behind = (marks.cumsum(dim=1) > 0) & real & ~marks
            questions = behind.sum(dim=1).tolist()
            mask = real & ~marks
        elif found:
            raise InputError(
                f"the delimiter {delimiter} stands at (row, column) {found}, expected once in each row; give one "
                "context and one question"
            )
    rows = without_padding(ids, mask)
    for asked, tokens in zip(questions, rows.counts, strict=True):
        if asked is None or not 0 < asked < tokens:
            raise InputError(
                f"{press.name} must know where the question begins, found {asked} question tokens in {tokens}: put "
                "the delimiter of compile(..., delimiter=id) between context and question, or say "
                "question_tokens=n, the number of tokens at the end that ask"
            )
    return Rows(rows.ids, rows.counts, tuple(questions), rows.place)
