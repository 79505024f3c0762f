"""The compression methods, one a file."""

from kvpass.presses.block import Block
from kvpass.presses.cap import Cap
from kvpass.presses.chunk import Chunk
from kvpass.presses.chunkkv import ChunkKV
from kvpass.presses.compactor import Compactor
from kvpass.presses.composed import Composed
from kvpass.presses.criticalkv import CriticalKV
from kvpass.presses.cur import CUR
from kvpass.presses.entropy_gated_chunkkv import EntropyGatedChunkKV
from kvpass.presses.expected_attention import ExpectedAttention
from kvpass.presses.expected_attention_stats import ExpectedAttentionStats
from kvpass.presses.finch import Finch
from kvpass.presses.key_rerotation import KeyRerotation
from kvpass.presses.keydiff import KeyDiff
from kvpass.presses.knorm import Knorm
from kvpass.presses.kvzap import KVzap
from kvpass.presses.lagkv import LagKV
from kvpass.presses.leverage import Leverage
from kvpass.presses.merging import Merging
from kvpass.presses.non_causal_attention import NonCausalAttention
from kvpass.presses.observed_attention import ObservedAttention
from kvpass.presses.per_layer import PerLayer
from kvpass.presses.pyramidkv import PyramidKV
from kvpass.presses.qfilter import QFilter
from kvpass.presses.random import Random
from kvpass.presses.simlayerkv import SimLayerKV
from kvpass.presses.snapkv import SnapKV
from kvpass.presses.streaming_llm import StreamingLLM
from kvpass.presses.think import ThinK
from kvpass.presses.tova import TOVA

__all__ = [
    "CUR",
    "TOVA",
    "Block",
    "Cap",
    "Chunk",
    "ChunkKV",
    "Compactor",
    "Composed",
    "CriticalKV",
    "EntropyGatedChunkKV",
    "ExpectedAttention",
    "ExpectedAttentionStats",
    "Finch",
    "KVzap",
    "KeyDiff",
    "KeyRerotation",
    "Knorm",
    "LagKV",
    "Leverage",
    "Merging",
    "NonCausalAttention",
    "ObservedAttention",
    "PerLayer",
    "PyramidKV",
    "QFilter",
    "Random",
    "SimLayerKV",
    "SnapKV",
    "StreamingLLM",
    "ThinK",
]
