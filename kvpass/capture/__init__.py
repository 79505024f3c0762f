"""From a live model to a captured program."""

import inspect
from contextlib import suppress

from torch import nn
from torch._dynamo.exc import UserError
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from transformers import PreTrainedModel

from kvpass.capture.export import export_model, program_from_export
from kvpass.capture.fixed_rope import rope_fixed_for
from kvpass.capture.functional_form import functional
from kvpass.capture.interface import interface_of
from kvpass.capture.transformers_model import (
    OwnAttentionError,
    attending_with,
    export_transformers,
    max_tokens_of,
)
from kvpass.errors import KVPassError, UnsupportedModelError
from kvpass.ir.program import KVProgram

__all__ = ["capture"]

PLAIN = ("sdpa", "eager")  # attention that is made of tensor operations


def capture(model: nn.Module | ExportedProgram, *, registry: bool = True, max_tokens: int | None = None) -> KVProgram:
    """Capture `model` as a program (input_ids i64[B, S], position_ids i64[B, S]) -> logits [B, S, V].

    A transformers model is captured through its attention registry; one with attention code of its own (any one with
    `registry=False`) as it is, with eager attention or sdpa, and what that does is found in the graph. Any other
    module must have a forward that takes token ids, and `position_ids` if it can, and returns logits [B, S, V]; so
    must a program that was exported already, with dynamic batch and length. `max_tokens` is the longest text it will
    read, by default what its config or its export says.

    Raises `UnsupportedModelError` if torch.export cannot capture the model or it lacks those inputs.
    """
    if isinstance(model, ExportedProgram):
        return _from_export(model, max_tokens)
    training = model.training
    model.eval()
    longest = max_tokens or max_tokens_of(model)
    try:
        with rope_fixed_for(model, longest) as notes:
            exported, longest = _export(model, longest, registry)
        program = program_from_export(exported)
        program.notes, program.max_tokens = notes, longest
        return program
    except KVPassError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"torch.export cannot capture {type(model).__name__}{_why(error)}: {type(error).__name__}: {error}. "
            f"Try torch.export.export on the model alone to see where it fails. If it holds tables for fewer than "
            f"{longest} positions, say so with max_tokens="
        ) from error
    finally:
        model.train(training)


def _why(error: Exception) -> str:
    """What torch's words mean for a language model."""
    text = str(error)
    if "Constraints violated" in text or "Specializations unexpectedly" in text:
        return (
            ", whose code treats some lengths of text apart, as recurrent layers, linear attention and scans over "
            "chunks do (a KV cache does not hold their state)"
        )
    if isinstance(error, GuardOnDataDependentSymNode):
        return ", whose code goes by what the tokens say (a Python loop over experts, patches of varying length)"
    return ""


def _from_export(exported: ExportedProgram, max_tokens: int | None) -> KVProgram:
    interface = interface_of(exported)
    if max_tokens is not None and max_tokens > interface.max_tokens:
        raise UnsupportedModelError(f"max_tokens={max_tokens}: the program was exported for {interface.max_tokens}")
    program = program_from_export(functional(exported), interface)
    program.max_tokens = max_tokens or interface.max_tokens
    return program


def _export(model: nn.Module, longest: int, registry: bool) -> tuple[ExportedProgram, int]:
    """The export, and the longest text that it serves."""
    if not isinstance(model, PreTrainedModel):
        _check_signature(model)
        return _export_up_to(model, {}, longest)
    if registry:
        with suppress(OwnAttentionError):
            return export_transformers(model, longest), longest
    own = model.config._attn_implementation  # the two may differ, so what the model has comes first
    with attending_with(model, *([own] if own in PLAIN else []), *PLAIN):
        return _export_up_to(model, {"use_cache": False}, longest)


def _export_up_to(model: nn.Module, fixed: dict[str, object], longest: int) -> tuple[ExportedProgram, int]:
    """The export, and the longest text that it serves: one token less where a table of `longest` rows is cut."""
    try:
        return export_model(model, fixed, longest), longest
    except UserError as error:  # "tokens != longest": at full length nothing is cut, which export holds apart
        if f"!= {longest}." not in str(error):
            raise
        return export_model(model, fixed, longest - 1), longest - 1


def _check_signature(model: nn.Module) -> None:
    accepted = inspect.signature(model.forward).parameters
    if not accepted:
        raise UnsupportedModelError(
            f"{type(model).__name__}.forward takes nothing, expected token ids [B, S] and, if it can, position_ids"
        )
