"""A pool that is drained finishes what it has, takes nothing more, leaves, and comes back when it is reloaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.live.client import descendants, finish, is_running, kill, open_client, stream, submit, until, workers
from tests.live.models import (
    ROOM_FOR_ONE,
    a_model,
    health,
    held_load,
    long_task,
    ref,
    reserved,
    simulated,
    states,
    task,
)
from tests.live_service import LiveService, live_service

pytestmark = pytest.mark.xdist_group("drain and reload")

MINUTE = {"deadline_ms": 60_000}


@pytest.fixture(scope="module")
def service() -> Iterator[LiveService]:
    """One pool, which is to stay loaded."""
    settings = {"devices": simulated(card=ROOM_FOR_ONE), "pools": [{"id": "default", "slots": 1, "ctx": 2048}]}
    with live_service(settings) as service:
        yield service


@pytest.fixture
def client(service: LiveService) -> Iterator[httpx.Client]:
    """The pool serves when the test begins, and whatever it did to the pool is over for the next one."""
    with open_client(service) as client:
        if health(client, "default")["draining"]:
            come_back(client)
        until(lambda: health(client, "default")["ready"])
        yield client


def drain(client: httpx.Client, **body: Any) -> dict[str, Any]:
    answer = client.post("/v1/pools/default/drain", json=body)
    assert answer.status_code == 202, answer.text
    said: dict[str, Any] = answer.json()
    return said


def come_back(client: httpx.Client) -> None:
    answer = client.post("/v1/pools/default/reload", json={"new_model_ref": "builtin:tiny"})
    assert answer.status_code == 202, answer.text
    until(lambda: str(health(client, "default")["last_reload"]).startswith("done: "))
    now = health(client, "default")
    assert (now["live"], now["ready"], now["draining"]) == (True, True, False)


def is_unloaded(client: httpx.Client, service: LiveService) -> bool:
    return set(states(client, "default").values()) == {"unloaded"} and reserved(client) == {"card": 0}


@pytest.mark.spec("HP-CTL-2")
def test_what_runs_and_what_waits_comes_to_its_end(client: httpx.Client, service: LiveService) -> None:
    """Newcomers are told that the pool is away and when to come back; with the last task the model leaves, its memory
    and its process too; a reload brings all of it back."""
    running = long_task(client, prompts=2)
    waiting = submit(client, max_tokens=8)["task_id"]
    until(lambda: task(client, running)["state"] == "running")
    said = drain(client, **MINUTE)
    assert (said["draining"], said["live"]) == (True, True)
    refused = client.post("/v1/tasks", json={"model_ref": "builtin:tiny", "prompt": "Once"})
    assert (refused.status_code, refused.json()["code"]) == (503, "POOL_UNAVAILABLE")
    assert int(refused.headers["Retry-After"]) >= 1
    assert [stream(client, one)[-1].event for one in (running, waiting)] == ["end", "end"]
    until(lambda: is_unloaded(client, service))
    assert workers(service) == {}
    come_back(client)
    assert finish(client, max_tokens=4)[-1].event == "end"


@pytest.mark.spec("HP-CTL-2")
def test_what_is_left_at_the_deadline_ends(client: httpx.Client, service: LiveService) -> None:
    """The task that runs and the one that waits end with POOL_UNAVAILABLE, and the model leaves."""
    ids = [long_task(client), submit(client, max_tokens=8)["task_id"]]
    until(lambda: task(client, ids[0])["state"] == "running")
    drain(client, deadline_ms=300)
    lasts = [stream(client, one)[-1] for one in ids]
    assert [(last.event, last.data["code"]) for last in lasts] == [("error", "POOL_UNAVAILABLE")] * 2
    until(lambda: is_unloaded(client, service))
    assert descendants(service.pid) == []


@pytest.mark.spec("HP-CTL-2")
def test_a_second_drain_sets_the_deadline_anew(client: httpx.Client, service: LiveService) -> None:
    """One with a minute's time, then one without any: the task ends now. A third one on the empty pool is no harm."""
    running = long_task(client)
    until(lambda: task(client, running)["state"] == "running")
    drain(client, **MINUTE)
    assert task(client, running)["state"] == "running"
    drain(client, deadline_ms=0)
    assert stream(client, running)[-1].data["code"] == "POOL_UNAVAILABLE"
    until(lambda: is_unloaded(client, service))
    assert drain(client, **MINUTE)["draining"]


@pytest.mark.spec("HP-CTL-2", "HP-ERR-1")
def test_there_is_no_such_pool(client: httpx.Client) -> None:
    """404, for a reload as well; and a model that may not be named leaves the pool as it is."""
    for path, body in (("drain", MINUTE), ("reload", {"new_model_ref": "builtin:tiny"})):
        answer = client.post(f"/v1/pools/nowhere/{path}", json=body)
        assert (answer.status_code, answer.json()["code"]) == (404, "NOT_FOUND")
    for reference in ("builtin:none", "file:/etc/passwd"):
        answer = client.post("/v1/pools/default/reload", json={"new_model_ref": reference})
        assert (answer.status_code, answer.json()["code"]) == (404, "NOT_FOUND")
    assert health(client, "default")["ready"]


@pytest.mark.spec("HP-CTL-2", "HP-PLC-7")
def test_a_drain_while_the_model_loads(tmp_path: Path, llama_server: Path) -> None:
    """Without a task the load is broken off, though it would never have ended; with one that waits it goes on, the task
    gets its end, and then the model leaves. No process stays."""
    model = a_model(tmp_path, "loads")
    settings = {
        "devices": simulated(card=ROOM_FOR_ONE),
        "engines": {"llamacpp": {"launcher": "binary", "binary": str(llama_server)}},
        "pools": [{"id": "default", "model": ref(model), "slots": 1, "max_tokens": 8}],
        "catalog": {"file_roots": [str(tmp_path)]},
    }
    with held_load(model) as go, live_service(settings) as service, open_client(service) as client:
        until(lambda: workers(service) != {})
        drain(client, **MINUTE)
        until(lambda: is_unloaded(client, service))
        assert descendants(service.pid) == []
        answer = client.post("/v1/pools/default/reload", json={"new_model_ref": ref(model)})
        assert answer.status_code == 202, answer.text
        until(lambda: workers(service) != {})
        go()
        until(lambda: health(client, "default")["ready"])
        assert finish(client, model_ref=ref(model))[-1].event == "end"


@pytest.mark.spec("HP-CTL-2")
def test_a_drain_while_a_task_waits_for_the_load(tmp_path: Path, llama_server: Path) -> None:
    """The load goes on for its sake, and the model leaves behind its end."""
    model = a_model(tmp_path, "awaited")
    settings = {
        "devices": simulated(card=ROOM_FOR_ONE),
        "engines": {"llamacpp": {"launcher": "binary", "binary": str(llama_server)}},
        "pools": [{"id": "default", "model": ref(model), "slots": 1}],
    }
    with held_load(model) as go, live_service(settings) as service, open_client(service) as client:
        waiting = submit(client, model_ref=ref(model), max_tokens=8)["task_id"]
        drain(client, **MINUTE)
        go()
        assert stream(client, waiting)[-1].event == "end"
        until(lambda: is_unloaded(client, service))
        assert descendants(service.pid) == []


@pytest.mark.spec("HP-PLC-7")
@pytest.mark.parametrize("victim", ["wrapper", "binary"])
def test_a_worker_is_killed_while_it_loads(tmp_path: Path, llama_server: Path, victim: str) -> None:
    """The task that waits for it goes on waiting, the load begins anew, and the task gets its end. Nothing is left of
    the first worker."""
    model = a_model(tmp_path, "killed")
    settings = {
        "devices": simulated(card=ROOM_FOR_ONE),
        "engines": {"llamacpp": {"launcher": "binary", "binary": str(llama_server)}},
        "pools": [{"id": "default", "model": ref(model), "slots": 1}],
    }
    with held_load(model) as go, live_service(settings) as service, open_client(service) as client:
        waiting = submit(client, model_ref=ref(model), max_tokens=8)["task_id"]
        until(lambda: len(descendants(service.pid)) == 2)
        first = descendants(service.pid)
        wrapper = workers(service)["llama_server"]
        kill(wrapper if victim == "wrapper" else next(pid for pid in first if pid != wrapper))
        until(lambda: health(client, "default")["replicas"][0]["restarts"] == 1)
        go()
        assert stream(client, waiting)[-1].event == "end"
        assert not any(is_running(pid) for pid in first)
        assert len(descendants(service.pid)) == 2
