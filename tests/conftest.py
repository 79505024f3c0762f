"""Fixtures of all tests."""

import os

import pytest
from models import captured_model, compiled_model, eager_model, token_ids  # noqa: F401
from tiny_models import ARCHITECTURES

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(params=ARCHITECTURES)
def arch(request: pytest.FixtureRequest) -> str:
    return str(request.param)
