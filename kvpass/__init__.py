"""KV-cache compression as a compiler pass: torch.export in, a model that compresses its own cache out."""

from kvpass import presses
from kvpass.api import CapturedModel, capture_model, compile, load
from kvpass.errors import KVPassError
from kvpass.press import Press, ScorerPress
from kvpass.press_inputs import PressInputs
from kvpass.registry import register_press, registered_presses
from kvpass.runtime.cache import CompressedCache
from kvpass.runtime.model import CompiledModel

__all__ = [
    "CapturedModel",
    "CompiledModel",
    "CompressedCache",
    "KVPassError",
    "Press",
    "PressInputs",
    "ScorerPress",
    "capture_model",
    "compile",
    "load",
    "presses",
    "register_press",
    "registered_presses",
]
