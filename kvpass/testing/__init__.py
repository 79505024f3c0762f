"""Helpers for tests of your own: graph snapshots of your models, checks of your presses.

    from kvpass.testing import assert_graph_diff, check_press

Snapshots need the package expecttest; `EXPECTTEST_ACCEPT=1 pytest` writes the current graph into the test's source.
"""

from kvpass.testing.presses import check_press, random_inputs
from kvpass.testing.snapshots import assert_exported_diff, assert_graph_diff, assert_pass_diff

__all__ = ["assert_exported_diff", "assert_graph_diff", "assert_pass_diff", "check_press", "random_inputs"]
