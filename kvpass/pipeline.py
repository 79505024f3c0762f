"""Which passes run, in which order."""

from kvpass.ir.form import Phase
from kvpass.pass_manager import Pass
from kvpass.passes.accept_embeddings import AcceptEmbeddings
from kvpass.passes.drop_noops import DropNoops
from kvpass.passes.find_positions import FindPositions
from kvpass.passes.insert_kv_cache import InsertKVCache
from kvpass.passes.locate_attention import LocateAttention
from kvpass.passes.lower_attention import LowerAttention
from kvpass.passes.lower_for_tensorrt import LowerForTensorRT
from kvpass.passes.match_attention import MatchAttention
from kvpass.passes.merge_attention import MergeAttention
from kvpass.passes.narrow_to_last_token import NarrowToLastToken
from kvpass.passes.normalize_attention import NormalizeAttention
from kvpass.passes.prove_token_local import ProveTokenLocal
from kvpass.passes.return_cache import ReturnCache
from kvpass.passes.specialize_phase import SpecializePhase
from kvpass.passes.splice_evict import SpliceEvict
from kvpass.passes.splice_press import SplicePress
from kvpass.passes.stream_cache import StreamCache
from kvpass.passes.stream_weights import StreamWeights
from kvpass.passes.write_cache_in_place import WriteCacheInPlace
from kvpass.press import Press


def capture_passes() -> tuple[Pass, ...]:
    """Once for a model."""
    return (
        DropNoops(),
        FindPositions(),
        MatchAttention(),
        NormalizeAttention(),
        MergeAttention(),
        LocateAttention(),
        ProveTokenLocal(),
    )


def phase_passes(
    phase: Phase,
    press: Press | None,
    layers: frozenset[int] | None = None,
    *,
    embeddings: bool = False,
    one_row: bool = False,
    functional: bool = False,
    tensorrt: LowerForTensorRT | None = None,
) -> tuple[Pass, ...]:
    """Once for each phase of a compiled model; `layers` are those to press, None: all that can be.

    `embeddings`: the graph reads those instead of token ids. `one_row`: the batch is one row, whose single tokens read
    all weights and a cache for themselves. `functional`: the cache leaves the graph, nothing is written in place.
    `tensorrt`: then in the forms that TensorRT takes.
    """
    if phase is not Phase.PREFILL:
        press = None
    return (
        # one graph per phase
        SpecializePhase(phase, press.min_tokens, press.example_tokens)
        if press
        else SpecializePhase(phase, one_row=one_row),
        # the cache
        InsertKVCache(),
        # the press
        *((SplicePress(press, layers), SpliceEvict()) if press else ()),
        # lower
        ReturnCache() if functional else WriteCacheInPlace(),
        *((AcceptEmbeddings(),) if embeddings else ()),
        *((NarrowToLastToken(), LowerAttention()) if phase is Phase.PREFILL else ()),
        *((StreamCache(), StreamWeights()) if one_row else ()),
        *((tensorrt,) if tensorrt else ()),
    )
