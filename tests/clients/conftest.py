"""One service for clients that others wrote: a pool with the model that we ship, one that has a single slot, no queue
and much room, one for vectors, and one whose template knows tools."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.live.client import open_client, until
from tests.live.models import ref
from tests.live_service import LiveService, live_service
from tests.tool_models import a_tool_model

# Before litellm is imported, which would fetch prices from the network.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

LIMIT_S = 60.0
NO_QUEUE = {"capacity": 0}
MODELS = ["default", "full", "embedder", "tools"]  # as they are listed, before the references


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--node-modules", type=Path, help="the folder that has npm's package openai")
    parser.addoption("--aider", type=Path, help="the program aider, which wants an environment of its own")


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveService]:
    folder = tmp_path_factory.mktemp("models")
    files = [folder / f"{name}.gguf" for name in ("full", "embedder")]
    for file in files:
        file.touch()
    card = {"id": "card", "backend": "simulated", "vram_bytes": 24 << 30}
    # Aider's words to the model are long.
    full = {"id": "full", "engine": "simulated", "model": ref(files[0]), "slots": 1, "ctx": 32768, "queue": NO_QUEUE}
    embedder = {"id": "embedder", "engine": "simulated", "model": ref(files[1]), "slots": 1}
    tools = {"id": "tools", "model": ref(a_tool_model(folder / "tools.gguf"))}
    with live_service({"devices": [card], "pools": [{"id": "default"}, full, embedder, tools]}) as running:
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
    with blocked(ours, 150) as count:
        yield count


@contextmanager
def blocked(ours: httpx.Client, tokens: int) -> Iterator[Callable[[], int]]:
    """The same, by a task of so many tokens, of which some fifty take a second."""
    model = ours.get("/v1/pools/full").json()["model"]
    before = refused(ours)
    blocker = ours.post("/v1/tasks", json={"model_ref": model, "prompt": "x", "max_tokens": tokens}).json()["task_id"]
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
