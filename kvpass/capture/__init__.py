"""From a live model to a captured program."""

import inspect

from torch import nn
from transformers import PreTrainedModel

from kvpass.capture.export import export_model, program_from_export
from kvpass.capture.fixed_rope import rope_fixed_for
from kvpass.capture.transformers_model import export_transformers, max_tokens_of
from kvpass.errors import KVPassError, UnsupportedModelError
from kvpass.ir.program import KVProgram

__all__ = ["capture", "max_tokens_of"]


def capture(model: nn.Module, *, registry: bool = True, max_tokens: int | None = None) -> KVProgram:
    """Capture `model` as a program (input_ids i64[B, S], position_ids i64[B, S]) -> logits [B, S, V].

    A transformers model is captured through its attention registry (`registry=False`: as it is, with sdpa
    attention, its masks and repeated heads left to `normalize-attention`). Any other module must have a forward
    that takes `input_ids` and `position_ids` and returns logits. `max_tokens` is the longest text it will read, by
    default what its config says.

    Raises `UnsupportedModelError` if torch.export cannot capture the model or it lacks those inputs.
    """
    training = model.training
    model.eval()
    longest = max_tokens or max_tokens_of(model)
    try:
        with rope_fixed_for(model, longest) as notes:
            if isinstance(model, PreTrainedModel) and registry:
                exported = export_transformers(model, longest)
            else:
                fixed = {"use_cache": False} if isinstance(model, PreTrainedModel) else {}
                _check_signature(model)
                exported = export_model(model, fixed, longest)
        program = program_from_export(exported)
        program.notes = notes
        return program
    except KVPassError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"torch.export cannot capture {type(model).__name__}: {type(error).__name__}: {error}. "
            "Try torch.export.export on the model alone to see where it fails"
        ) from error
    finally:
        model.train(training)


def _check_signature(model: nn.Module) -> None:
    accepted = inspect.signature(model.forward).parameters
    missing = {"input_ids", "position_ids"} - set(accepted)
    if missing:
        raise UnsupportedModelError(
            f"{type(model).__name__}.forward takes ({', '.join(accepted)}), it needs {' and '.join(sorted(missing))}: "
            "after an eviction the positions of new tokens cannot be counted inside the model"
        )
