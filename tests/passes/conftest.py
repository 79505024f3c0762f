"""Verification in full runs every pass, so nothing stored is used: in `test_each_pass.py`, and with --exhaustive."""

import pytest


@pytest.fixture(autouse=True)
def full_verification(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All fake values are recomputed behind each pass."""
    if request.config.getoption("--exhaustive") or request.path.stem == "test_each_pass":
        monkeypatch.setenv("KVPASS_VERIFY", "full")
