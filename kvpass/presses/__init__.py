"""The compression methods, one a file."""

from kvpass.presses.expected_attention import ExpectedAttention
from kvpass.presses.knorm import Knorm
from kvpass.presses.random import Random
from kvpass.presses.snapkv import SnapKV
from kvpass.presses.streaming_llm import StreamingLLM
from kvpass.presses.tova import TOVA

__all__ = ["TOVA", "ExpectedAttention", "Knorm", "Random", "SnapKV", "StreamingLLM"]
