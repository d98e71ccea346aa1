"""One service on both real engines for each test process; tests that hurt it start one of their own. And the machine
that is not there: a driver that tells of two cards, and a `llama-server`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.devices.conftest import machine, nvml_library
from tests.engines.conftest import llama_server
from tests.live_service import LiveService, live_service

__all__ = ["llama_server", "machine", "nvml_library"]

POOLS: list[dict[str, Any]] = [
    {"id": "default", "slots": 4, "ctx": 2048},
    {"id": "second", "engine": "ctransformers", "ctx": 1024},
]


@pytest.fixture(scope="session")
def service() -> Iterator[LiveService]:
    """llama.cpp and ctransformers, each with the model that we ship."""
    with live_service({"pools": POOLS}) as running:
        yield running
