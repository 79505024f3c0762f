"""Fixtures of all tests."""

import atexit
import gc
import os
import shutil
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported
if "KVPASS_GRAPH_CACHE" not in os.environ:  # every run exports anew, and what one worker exported serves the others
    os.environ["KVPASS_GRAPH_CACHE"] = tempfile.mkdtemp(prefix="kvpass-test-graphs-")
    atexit.register(shutil.rmtree, os.environ["KVPASS_GRAPH_CACHE"], ignore_errors=True)

import pytest
import torch
from models import captured_model, compiled_model, eager_model, token_ids  # noqa: F401
from tiny_models import ARCHITECTURES

from kvpass import registered_presses, registry

gc.set_threshold(200_000)  # traced graphs live long; looking for cycles in them took a seventh of the time
torch.set_num_threads(1)  # tiny tensors: a second thread only waits, and on a busy machine it waits long


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--exhaustive", action="store_true", help="products of which a part is tested otherwise")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--exhaustive"):
        return
    left_out = [item for item in items if item.get_closest_marker("exhaustive")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if not item.get_closest_marker("exhaustive")]


@pytest.fixture(params=ARCHITECTURES)
def arch(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def same_presses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A press that one test registers is unknown to the next."""
    monkeypatch.setattr(registry, "_REGISTRY", dict(registered_presses()))
