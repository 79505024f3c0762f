"""Pin what the passes do to a graph."""

from pathlib import Path

from kvpass.deployment.diff import diff_text
from kvpass.deployment.export import read_texts
from kvpass.ir.form import Phase
from kvpass.ir.printer import graph_diff
from kvpass.ir.program import KVProgram
from kvpass.pass_manager import Pass, PassManager
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


def assert_exported_diff(before: str | Path, after: str | Path, expect: str, *, only: str | None = None) -> None:
    """Assert what two exported models differ in, as `kvpass diff` shows it; `expect` as above.

    before, after: packages of `CompiledModel.export`, or files of `torch.export.save`. `only`: one program, "prefill".
    Raises `PackageError` for something else.
    """
    from expecttest import assert_expected_inline  # only tests have it

    old, new = (
        {name: text for name, text in read_texts(path).items() if only in (None, name)} for path in (before, after)
    )
    assert_expected_inline("\n" + diff_text(old, new), expect, skip=1)


def assert_pass_diff(before: KVProgram, step: Pass, expect: str, *, layer: int | None = 0) -> None:
    """Assert what one pass does to one layer of `before` (`None`: outside all layers); `expect` as above.

    For passes in front of the cut into phases, and for passes of one's own. `before` is not changed. Nothing is
    returned: expecttest finds the literal of a call that is a statement of its own, and of no other.
    """
    from expecttest import assert_expected_inline  # only tests have it

    after = PassManager((step,)).run(before)
    assert_expected_inline("\n" + graph_diff(before, after, layer), expect, skip=1)
