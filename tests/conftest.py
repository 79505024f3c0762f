"""Fixtures of all tests."""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported
os.environ.setdefault("KVPASS_GRAPH_CACHE", "0")  # every test run exports and transforms anew

import pytest
import torch
from models import captured_model, compiled_model, eager_model, token_ids  # noqa: F401
from tiny_models import ARCHITECTURES

from kvpass import registered_presses, registry

gc.set_threshold(200_000)  # traced graphs live long; looking for cycles in them took a seventh of the time
torch.set_num_threads(1)  # tiny tensors: a second thread only waits, and on a busy machine it waits long


@pytest.fixture(params=ARCHITECTURES)
def arch(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def same_presses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A press that one test registers is unknown to the next."""
    monkeypatch.setattr(registry, "_REGISTRY", dict(registered_presses()))
