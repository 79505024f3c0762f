"""Every pass is verified in full here: all fake values are recomputed behind each one."""

import pytest


@pytest.fixture(autouse=True)
def full_verification(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVPASS_VERIFY", "full")
