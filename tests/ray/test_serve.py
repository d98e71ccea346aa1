"""A Ray cluster behind our front door: its replicas may die in the middle of the load, and no client is worse off than
having to ask again."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from openai import OpenAI
from tests.live.client import LIMIT_S, open_client, stream, submit, until
from tests.live_service import LiveService, live_service
from tests.runtime.frames import Seen

MODEL = "openai:ray/tiny"
CLIENTS, KILLS_MAX = 10, 20
PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def service(serve_url: str) -> Iterator[LiveService]:
    server = {
        "name": "ray",
        "base_url": f"{serve_url}/v1",
        "max_concurrency": CLIENTS,
        "health_interval_ms": 500,
    }
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


def until_it_ends_well(client: httpx.Client, **body: Any) -> list[list[Seen]]:
    """What a client does that has read docs/retries.md: a task that lost its worker is submitted again. The frames of
    each try."""
    tries: list[list[Seen]] = []
    while not tries or tries[-1][-1].event == "error":
        tries.append(stream(client, submit(client, model_ref=MODEL, **body)["task_id"]))
        last = tries[-1][-1]
        assert last.event == "end" or (last.data["code"], last.data["retriable"]) == ("WORKER_RESET", True)
    return tries


def test_requests_survive_the_death_of_a_replica(service: LiveService, client: httpx.Client, serve_url: str) -> None:
    """kill -9 while clients keep both replicas busy, again and again until somebody feels it: whether the dead one had
    anything in hand is chance. A run that had no token yet is tried again unseen; a task whose answer had begun ends
    with an error that says that it may be repeated, and is. No more are hurt than the dead ones had in hand, the pool
    is ready all the time, and Serve starts others in their place."""
    done: list[list[list[Seen]]] = []
    enough = threading.Event()

    def keep_asking() -> None:
        while not enough.is_set():
            done.append(until_it_ends_well(client, inputs=[PROMPT] * 4))

    def told(words: str) -> int:
        return sum(words in line["message"] for line in service.log() if line["logger"] == "llama_orch.remote")

    killed: list[int] = []
    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(keep_asking) for _ in range(CLIENTS)]
        try:
            while len(killed) < KILLS_MAX and not (hurt_of(done) or told("tried again")):
                until(lambda: len(replicas(serve_url) - set(killed)) == 2, 120)
                killed.append(min(replicas(serve_url) - set(killed)))
                os.kill(killed[-1], signal.SIGKILL)
                ended = len(done)
                until(lambda ended=ended: len(done) >= ended + 2 * CLIENTS)
        finally:
            enough.set()
        for one in clients:
            one.result(LIMIT_S * 4)
    hurt, again, busy = hurt_of(done), told("tried again"), told("no more is asked")
    print(
        f"{len(killed)} killed: {len(hurt)} of {len(done)} tasks repeated, {again} runs tried again, {busy} times busy"
    )
    assert all(tries[-1][-1].event == "end" for tries in done)
    assert hurt or again, "nobody felt it: the load was too light to prove anything"
    assert len(hurt) <= 2 * len(killed)  # what a replica decodes at a time
    assert all(any(seen.event == "token" for seen in tries[0]) for tries in hurt)
    (replica,) = client.get("/v1/pools/ray/health").json()["replicas"]
    assert (replica["state"], replica["restarts"]) == ("ready", 0)
    until(lambda: len(replicas(serve_url) - set(killed)) == 2, 120)


def hurt_of(done: list[list[list[Seen]]]) -> list[list[list[Seen]]]:
    return [tries for tries in done if len(tries) > 1]
