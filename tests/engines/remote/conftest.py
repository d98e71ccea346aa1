"""Tries follow one another at once."""

from __future__ import annotations

import pytest

from llama_orch.engines.remote import worker


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "RETRY_PAUSES_S", (0.0, 0.0, 0.0))
    monkeypatch.setattr(worker, "SECOND_LOOK_S", 0.0)
