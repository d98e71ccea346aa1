"""One service for clients that others wrote: a pool with the model that we ship, one that has a single slot, no queue
and time, and one for vectors."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.live.client import open_client, until
from tests.live.models import ref
from tests.live_service import LiveService, live_service

# Before litellm is imported, which would fetch prices from the network.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

LIMIT_S = 60.0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--node-modules", type=Path, help="the folder that has npm's package openai")


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveService]:
    folder = tmp_path_factory.mktemp("models")
    files = [folder / f"{name}.gguf" for name in ("full", "embedder")]
    for file in files:
        file.touch()
    card = {"id": "card", "backend": "simulated", "vram_bytes": 24 << 30}
    full = {"id": "full", "engine": "simulated", "model": ref(files[0]), "slots": 1, "queue": {"capacity": 0}}
    embedder = {"id": "embedder", "engine": "simulated", "model": ref(files[1]), "slots": 1}
    with live_service({"devices": [card], "pools": [{"id": "default"}, full, embedder]}) as running:
        with open_client(running) as client:
            until(lambda: all(pool["ready"] for pool in client.get("/v1/pools").json()["items"]))
        yield running


@pytest.fixture
def ours(service: LiveService) -> Iterator[httpx.Client]:
    """The first door."""
    with open_client(service) as client:
        yield client


@pytest.fixture
def busy(ours: httpx.Client) -> Iterator[Callable[[], int]]:
    """The slot of pool `full` is taken by a task of some seconds. The result says how many were refused since."""
    model = ours.get("/v1/pools/full").json()["model"]
    body = {"model_ref": model, "prompt": "x", "max_tokens": 150}
    before = refused(ours)
    blocker = ours.post("/v1/tasks", json=body).json()["task_id"]
    yield lambda: refused(ours) - before
    ours.post(f"/v1/tasks/{blocker}/cancel")


def refused(ours: httpx.Client) -> int:
    """Tasks that found the queue full."""
    lines = ours.get("/metrics").text.splitlines()
    found = [line for line in lines if line.startswith("tasks_rejected_total{") and 'reason="ADMISSION_REJECT"' in line]
    return round(sum(float(line.split()[-1]) for line in found))


@pytest.fixture
def states(ours: httpx.Client) -> Callable[[], list[str]]:
    """Of all tasks, newest first."""

    def look() -> list[str]:
        found: list[dict[str, Any]] = ours.get("/v1/tasks").json()["items"]
        return [one["state"] for one in found]

    return look
