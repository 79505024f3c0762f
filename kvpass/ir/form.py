"""The stations in the life of a graph."""

from enum import Enum, IntEnum


class Form(IntEnum):
    """What a program's graph looks like; a pass names the form that it needs and the one it leaves."""

    CAPTURED = 1  # functional aten graph, parameters as attributes
    NORMAL = 2  # no noise ops, one node per attention, KV heads un-repeated, masks causal or windowed
    LOCATED = 3  # every attention carries its layer and mask
    SPECIALIZED = 4  # sizes belong to one phase
    CACHED = 5  # cache tensors enter and leave the graph
    PRESSED = 6  # pressed layers hold what the press leaves of their pairs
    COMPRESSED = 7  # only the kept pairs are written to the cache
    LOWERED = 8  # as a backend takes it: the cache is written in place, or leaves the graph


class Phase(Enum):
    """Which of the graphs that are cut from one capture a program is."""

    PREFILL = "prefill"  # empty cache, S tokens: attend in full, then keep the best
    EXTEND = "extend"  # S tokens appended to what is cached, nothing dropped
    DECODE = "decode"  # one token appended
