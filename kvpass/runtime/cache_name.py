"""What transformers calls a cache, among arguments and in outputs: `past_key_values`, since release 5.24 `cache`."""

from dataclasses import fields
from typing import TypeVar

from transformers.modeling_outputs import CausalLMOutputWithPast

from kvpass.errors import InputError

C = TypeVar("C")
CACHE = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"


def given_cache(past_key_values: C | None, cache: C | None) -> C | None:
    """The one that is there. Raises `InputError` if both are."""
    if past_key_values is not None and cache is not None:
        raise InputError("past_key_values= and cache= are two names of one argument; give one of them")
    return cache if past_key_values is None else past_key_values
