"""However a task is ended, its slot is free within 250 ms: by cancel, by Ctrl-C, by its deadline, by a drain; on both
engines, while they decode and while they read a prompt.

A slot counts as free when the pool's health says so, and that waits for the engine's own word (`/slots`). 250 ms is
what HP-STR-6 asks for, and what is measured here is the service and everything else that wants the machine. So each way
is measured five times and the median counts; where it is above, all five are measured once more. A service that is late
by design is late ten times. The figures are printed (`pytest -rP`).
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.live.client import ENGINES, LIMIT_S, live_frames, open_client, stream, submit, until
from tests.live.models import LONG, health, task
from tests.live_service import LiveService, live_service

pytestmark = pytest.mark.xdist_group("cancel")

BOUND_S = 0.25
TIMES = 5
POOLS: list[dict[str, Any]] = [
    {"id": "llamacpp", "slots": 4, "ctx": 2048},
    {"id": "ctransformers", "engine": "ctransformers", "ctx": 2048},
]


@pytest.fixture(scope="module")
def service() -> Iterator[LiveService]:
    """Until the last test no task of it comes to its end, so that nothing is measured and no deadline is refused at
    admission."""
    with live_service({"pools": POOLS}) as running:
        yield running


@pytest.fixture
def client(service: LiveService) -> Iterator[httpx.Client]:
    with open_client(service) as client:
        until(lambda: all(pool["ready"] for pool in client.get("/v1/pools").json()["items"]))
        yield client
        assert {replica["restarts"] for name in ENGINES for replica in health(client, name)["replicas"]} == {0}


def a_story(engine: str, **body: Any) -> dict[str, Any]:
    """A task that would go on for minutes."""
    sampling = {name: value for name, value in LONG["sampling"].items() if engine == "llamacpp" or name != "min_p"}
    return {"engine": engine, "inputs": ["Once upon a time"] * 256, "max_tokens": 1900, "sampling": sampling, **body}


def begun(client: httpx.Client, engine: str, **body: Any) -> str:
    """A story whose first token has come."""
    task_id: str = submit(client, **a_story(engine, **body))["task_id"]
    with live_frames(client, task_id) as frames:
        for frame in frames:
            if frame.event == "token":
                return task_id
    raise AssertionError("no token came")


def is_free(client: httpx.Client, engine: str) -> bool:
    return all(replica["slots_busy"] == 0 for replica in health(client, engine)["replicas"])


def busy_s(client: httpx.Client, engine: str) -> float:
    """How long the slots are still held, from now on."""
    began = time.monotonic()
    while not is_free(client, engine):
        assert time.monotonic() - began < LIMIT_S, "the slot never got free"
    return time.monotonic() - began


def check(what: str, engine: str, once: Callable[[], float]) -> None:
    """Measure as the module says, and judge."""
    for _ in range(2):
        seconds = [once() for _ in range(TIMES)]
        figures = ", ".join(f"{1000 * one:.0f}" for one in sorted(seconds))
        print(f"{what}, {engine}: slot free after {figures} ms")
        if statistics.median(seconds) <= BOUND_S:
            return
    raise AssertionError(f"{what}, {engine}: the slot was free only after {figures} ms")


@pytest.mark.spec("HP-STR-6")
@pytest.mark.parametrize("engine", ENGINES)
def test_by_cancel_while_it_decodes(client: httpx.Client, engine: str) -> None:
    """From the answer 204 on. What holds the slot is seen before: else nothing would be measured."""

    def once() -> float:
        task_id = begun(client, engine)
        assert not is_free(client, engine)
        assert client.post(f"/v1/tasks/{task_id}/cancel").status_code == 204
        return busy_s(client, engine)

    check("cancel while decoding", engine, once)


@pytest.mark.spec("HP-STR-6")
@pytest.mark.parametrize("engine", ENGINES)
def test_by_cancel_while_it_reads(client: httpx.Client, engine: str) -> None:
    """Prompts that fill the context, one after the other; each is read in batches."""

    def once() -> float:
        prompts = [f"{number} {'the little fox ' * 390}" for number in range(64)]
        task_id = submit(client, engine=engine, inputs=prompts, max_tokens=1)["task_id"]
        until(lambda: task(client, task_id)["state"] == "running")
        assert client.post(f"/v1/tasks/{task_id}/cancel").status_code == 204
        free_s = busy_s(client, engine)
        assert stream(client, task_id)[-1].data["code"] == "CANCELED"
        return free_s

    check("cancel while reading", engine, once)


@pytest.mark.spec("HP-ADM-4", "HP-STR-6")
@pytest.mark.parametrize("engine", ENGINES)
def test_by_its_deadline_while_it_decodes(client: httpx.Client, engine: str) -> None:
    """From its last frame on; and that frame comes at the deadline, by the service's own clock."""

    def once() -> float:
        task_id = begun(client, engine, deadline_ms=600)
        last = stream(client, task_id)[-1]
        free_s = busy_s(client, engine)
        assert (last.event, last.data["code"]) == ("error", "DEADLINE_UNMET")
        assert task(client, task_id)["tokens_out"] > 0
        return max(free_s, late_s(client, task_id, 0.6))

    check("deadline while decoding, or the deadline itself", engine, once)


def late_s(client: httpx.Client, task_id: str, deadline_s: float) -> float:
    """How long after its deadline the task ended; never before it."""
    status = task(client, task_id)
    created, ended = (datetime.fromisoformat(status[name]) for name in ("created_at", "ended_at"))
    late = (ended - created).total_seconds() - deadline_s
    assert late > -0.002  # the stamps are rounded to milliseconds
    return late


@pytest.mark.spec("HP-ADM-4")
@pytest.mark.parametrize("engine", ENGINES)
def test_a_deadline_in_the_queue(client: httpx.Client, engine: str) -> None:
    """Behind a task that goes on: it ends at its deadline and never starts; the other one is not disturbed."""
    running = begun(client, engine)

    def once() -> float:
        task_id = submit(client, **a_story(engine, deadline_ms=300))["task_id"]
        last = stream(client, task_id)[-1]
        assert (last.event, last.data["code"]) == ("error", "DEADLINE_UNMET")
        assert "passed in the queue" in last.data["message"]
        assert task(client, task_id)["started_at"] is None
        return late_s(client, task_id, 0.3)

    try:
        check("deadline in the queue, the deadline itself", engine, once)
        assert task(client, running)["state"] == "running"
    finally:
        client.post(f"/v1/tasks/{running}/cancel")
        busy_s(client, engine)


@pytest.mark.spec("HP-CTL-2")
@pytest.mark.parametrize("engine", ENGINES)
def test_by_a_drain_whose_deadline_is_now(client: httpx.Client, engine: str) -> None:
    """From the answer 202 on. The pool is brought back each time."""

    def once() -> float:
        task_id = begun(client, engine)
        assert client.post(f"/v1/pools/{engine}/drain", json={"deadline_ms": 0}).status_code == 202
        free_s = busy_s(client, engine)
        assert stream(client, task_id)[-1].data["code"] == "POOL_UNAVAILABLE"
        assert client.post(f"/v1/pools/{engine}/reload", json={"new_model_ref": "builtin:tiny"}).status_code == 202
        until(lambda: bool(health(client, engine)["ready"]))
        return free_s

    check("drain", engine, once)


@pytest.mark.spec("HP-STR-6", "HP-ERR-3")
@pytest.mark.parametrize("engine", ENGINES)
def test_by_ctrl_c_of_run(client: httpx.Client, service: LiveService, engine: str, tmp_path: Path) -> None:
    """From the command's own word that the task is canceled. The last test: see `service`."""
    command = [sys.executable, "-P", "-m", "llama_orch.cli", "run", "Once upon a time", "--engine", engine]
    env = os.environ | {
        "LLORCH_URL": service.url,
        "LLORCH_API_TOKEN": service.token,
        "LLORCH_HOME": str(tmp_path),
        "PYTHONUNBUFFERED": "1",
    }

    def once() -> float:
        """A seed may end its story before the interrupt comes; the next one has its turn then."""
        for seed in range(20):
            arguments = ["--max-tokens", "1900", "--seed", str(seed), "--no-record"]
            pipe = subprocess.PIPE
            with subprocess.Popen([*command, *arguments], env=env, stdout=pipe, stderr=pipe) as process:
                assert process.stdout is not None
                assert process.stderr is not None
                process.stdout.read(1)
                process.send_signal(signal.SIGINT)
                said = process.stderr.readline()
                free_s = busy_s(client, engine)
                process.communicate(timeout=LIMIT_S)
            if process.returncode == 130:
                assert said == b"interrupted: the task is canceled\n"
                return free_s
        raise AssertionError("every story ended before it was interrupted")

    check("Ctrl-C", engine, once)
