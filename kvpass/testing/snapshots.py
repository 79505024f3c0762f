"""Pin what the passes do to a graph."""

from kvpass.ir.form import Phase
from kvpass.runtime.model import CompiledModel


def assert_graph_diff(
    model: CompiledModel,
    expect: str,
    *,
    layer: int | None = 0,
    phase: Phase | str = Phase.PREFILL,
    only: str | None = None,
) -> None:
    """Assert that the graph diff of one layer is `expect`, a triple-quoted literal in the calling line.

    layer, phase and only are those of `CompiledModel.graph_diff`. With EXPECTTEST_ACCEPT=1 in the environment the
    literal is rewritten instead. Raises `AssertionError` with both texts; `ImportError` without expecttest.
    """
    from expecttest import assert_expected_inline  # only tests have it

    diff = model.graph_diff(layer, phase, only=only)
    assert_expected_inline("\n" + diff, expect, skip=1)
