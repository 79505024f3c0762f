"""Learn from a text what `qfilter` and `expected_attention_stats` need to know of a model."""

from kvpass.calibrate.collect import Progress
from kvpass.calibrate.files import save
from kvpass.calibrate.methods import METHODS, calibrate

__all__ = ["METHODS", "Progress", "calibrate", "save"]
