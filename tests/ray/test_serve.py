"""A Ray cluster behind our front door: its replicas may die in the middle of the load, and no client is worse off than
having to ask again."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import pytest

from openai import OpenAI
from tests.live.client import LIMIT_S, open_client, stream, submit, until
from tests.live_service import LiveService, live_service
from tests.runtime.frames import Seen

MODEL = "openai:ray/tiny"
CLIENTS, TASKS = 8, 48
# A story that goes on for a while: some hundred milliseconds of a core.
STORY: dict[str, Any] = {
    "model_ref": MODEL,
    "max_tokens": 400,
    "sampling": {"temperature": 1.5, "top_p": 1.0},
}


@pytest.fixture(scope="module")
def service(serve_url: str) -> Iterator[LiveService]:
    server = {"name": "ray", "base_url": f"{serve_url}/v1", "max_concurrency": CLIENTS, "health_interval_ms": 500}
    pool = {"id": "ray", "engine": "openai", "model": MODEL}
    with live_service({"engines": {"openai": {"servers": [server]}}, "pools": [pool]}) as running:
        with open_client(running) as client:
            until(lambda: bool(client.get("/v1/pools/ray").json()["ready"]))
        yield running


@pytest.fixture
def client(service: LiveService) -> Iterator[httpx.Client]:
    with open_client(service) as client:
        yield client


def replicas(serve_url: str) -> set[int]:
    """The processes that answered a few questions."""
    asked = [httpx.get(f"{serve_url}/replica", timeout=LIMIT_S, trust_env=False) for _ in range(12)]
    return {answer.json()["pid"] for answer in asked if answer.status_code == 200}


# In the kernel's spelling: 127.0.0.1, the same within IPv6, and ::1.
LOOPBACKS = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


def test_nothing_listens_beyond_this_machine(serve_url: str) -> None:
    """Of the processes that are Ray's, as the kernel tells."""
    owners = {os.readlink(fd): words for words, fds in _of_ray() for fd in fds if fd.is_symlink()}
    assert owners
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            owner = owners.get(f"socket:[{fields[9]}]")
            if fields[3] == "0A" and owner is not None:
                assert fields[1].partition(":")[0] in LOOPBACKS, f"{owner} listens on {fields[1]}"


def _of_ray() -> Iterator[tuple[str, list[Path]]]:
    """Command line and descriptors."""
    for pid in Path("/proc").iterdir():
        with suppress(OSError):  # it has ended, or is not ours
            words = (pid / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if pid.name.isdigit() and any(name in words for name in ("ray::", "raylet", "gcs_server")):
                yield words[:80], list((pid / "fd").iterdir())


def test_openais_client_talks_to_the_cluster(service: LiveService, client: httpx.Client) -> None:
    """What Serve's application tells of itself is what the pool has."""
    assert client.get("/v1/pools/ray").json()["ctx"] == 1024
    with OpenAI(base_url=f"{service.url}/v1", api_key=service.token, timeout=LIMIT_S) as ours:
        answer = ours.chat.completions.create(
            model="ray", messages=[{"role": "user", "content": "Tell me a story about a brave fox."}], max_tokens=12
        )
    assert answer.choices[0].message.content
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 12


def test_requests_survive_the_death_of_a_replica(client: httpx.Client, serve_url: str) -> None:
    """kill -9 in mid-load. What had no token yet is tried again unseen; what had ends with an error that says that the
    task may be repeated, and is. At most as many were hurt as the dead one had at a time. Serve starts another one, and
    the pool has been ready all the time."""
    until(lambda: len(replicas(serve_url)) == 2, 120)
    before = replicas(serve_url)
    begun = Event()

    def run(number: int) -> list[list[Seen]]:
        tries: list[list[Seen]] = []
        while not tries or tries[-1][-1].event == "error":
            tries.append(stream(client, submit(client, seed=number, **STORY)["task_id"]))
            if number >= CLIENTS:
                begun.set()
            error = tries[-1][-1].data
            assert tries[-1][-1].event == "end" or (error["code"], error["retriable"]) == ("WORKER_RESET", True)
        return tries

    with ThreadPoolExecutor(CLIENTS) as pool:
        runs = [pool.submit(run, number) for number in range(TASKS)]
        assert begun.wait(LIMIT_S)
        os.kill(min(before), signal.SIGKILL)
        done = [one.result(LIMIT_S * 4) for one in runs]
    assert all(tries[-1][-1].event == "end" for tries in done)
    hurt = [tries for tries in done if len(tries) > 1]
    assert len(hurt) <= 4
    for tries in hurt:
        assert any(seen.event == "token" for seen in tries[0])
    health = client.get("/v1/pools/ray/health").json()
    assert [one["restarts"] for one in health["replicas"]] == [0]
    until(lambda: len(replicas(serve_url) - {min(before)}) == 2, 120)
