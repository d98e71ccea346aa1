"""Models that tasks name and no pool serves: loaded when they are needed, and gone when others need their room."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.live.client import LIMIT_S, finish, open_client, stream, submit, until, workers
from tests.live.models import (
    ROOM_FOR_ONE,
    a_model,
    digest,
    health,
    held_load,
    is_ready,
    loads,
    long_task,
    pools,
    ref,
    reserved,
    simulated,
    task,
    total,
)
from tests.live_service import LiveService, live_service

pytestmark = pytest.mark.xdist_group("on demand")

# It has a place where nobody else fits beside it, and is loaded when somebody asks for it.
HOUSE = {"id": "default", "keep_alive_ms": 60_000}


def settings(folder: Path, *, on_demand: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """One card that holds one model, files of this folder, and nobody who has to stay."""
    return {
        "devices": simulated(card=ROOM_FOR_ONE),
        "pools": [HOUSE],
        "catalog": {"file_roots": [str(folder)]},
        "on_demand": {"min_residency_ms": 0} | (on_demand or {}),
        **more,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def service(folder: Path) -> Iterator[LiveService]:
    """Room for one model at a time, and nobody stays for longer than others can do without it."""
    with live_service(settings(folder)) as service:
        yield service


@pytest.fixture
def client(service: LiveService) -> Iterator[httpx.Client]:
    with open_client(service) as client:
        yield client


def seconds_of_log(service: LiveService, words: str) -> list[float]:
    """When lines with these words were logged."""
    found = [line["time"] for line in service.log() if words in line["message"]]
    return [_seconds(stamp) for stamp in found]


def _seconds(stamp: str) -> float:
    clock = stamp.split("T")[1].split("+")[0].removesuffix("Z").split(":")
    return float(clock[0]) * 3600 + float(clock[1]) * 60 + float(clock[2])


@pytest.mark.spec("HP-PLC-8", "HP-DET-2")
def test_a_file_below_a_root_is_loaded_and_answers(client: httpx.Client, folder: Path) -> None:
    """The task waits for its model; its end has the file's digest, and the pool that was made says what it is."""
    model = a_model(folder, "first")
    frames = finish(client, model_ref=ref(model), max_tokens=8)
    assert (frames[-1].event, frames[-1].data["model_digest"]) == ("end", digest(model))
    pool = pools(client)[ref(model)]
    assert (pool["on_demand"], pool["ready"], pool["ctx"]) == (True, True, 2048)


@pytest.mark.spec("HP-PLC-8")
def test_an_idle_model_leaves_for_another_one(client: httpx.Client, service: LiveService, folder: Path) -> None:
    """Both get their answers; afterwards the second one alone has memory and a process."""
    one, other = a_model(folder, "idle"), a_model(folder, "comes")
    for model in (one, other):
        frames = finish(client, model_ref=ref(model), max_tokens=8)
        assert (frames[-1].event, frames[-1].data["model_digest"]) == ("end", digest(model))
    assert (is_ready(client, ref(one)), is_ready(client, ref(other))) == (False, True)
    assert total(client, "replica_evictions_total", pool_id=pools(client)[ref(one)]["id"], reason="evicted") == 1
    (left,) = health(client, pools(client)[ref(other)]["id"])["replicas"]
    assert reserved(client) == {"card": left["vram_reserved_bytes"]}
    assert len(workers(service)) == 1


@pytest.mark.spec("HP-PLC-8")
def test_a_busy_model_is_never_evicted(client: httpx.Client, folder: Path) -> None:
    """Who waits for its room waits until what runs there has come to its end, and then gets it."""
    one, other = a_model(folder, "busy"), a_model(folder, "waits")
    running = long_task(client, model_ref=ref(one), prompts=2)
    until(lambda: task(client, running)["state"] == "running")
    waiting = submit(client, model_ref=ref(other), max_tokens=8)
    assert waiting["predicted_start_ms"] is None
    assert stream(client, running)[-1].event == "end"
    assert stream(client, waiting["task_id"])[-1].event == "end"
    assert task(client, waiting["task_id"])["started_at"] > task(client, running)["ended_at"]


@pytest.mark.spec("HP-PLC-8")
def test_two_agents_whose_models_do_not_fit_together(client: httpx.Client, folder: Path) -> None:
    """Each in a loop on a model of its own, four turns long: both get all of their answers from their own models, and
    no model is loaded more often than a turn begins."""
    models = [a_model(folder, "left"), a_model(folder, "right")]
    before = loads(client)

    def agent(model: Path) -> list[tuple[str, str]]:
        ends = [finish(client, model_ref=ref(model), max_tokens=24)[-1] for _ in range(4)]
        return [(end.event, end.data.get("model_digest", "")) for end in ends]

    with ThreadPoolExecutor(2) as threads:
        answers = list(threads.map(agent, models))
    assert answers == [[("end", digest(model))] * 4 for model in models]
    assert 2 <= loads(client) - before <= 8


@pytest.mark.spec("HP-ADM-7", "HP-PLC-8", "HP-ERR-2")
def test_a_conversation_with_a_cold_model(client: httpx.Client, folder: Path) -> None:
    """Its length cannot be told before the model is there: the first answer is to come back, with the wait, and the
    model is loaded so that the repeat finds it."""
    model = a_model(folder, "chat")
    body = {"model_ref": ref(model), "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}
    before = loads(client)
    refused = client.post("/v1/tasks", json=body)
    assert (refused.status_code, refused.json()["code"]) == (503, "POOL_UNREADY")
    assert int(refused.headers["Retry-After"]) >= 1
    assert refused.json()["retriable"]
    until(lambda: is_ready(client, ref(model)))
    assert finish(client, **body)[-1].event == "end"
    assert loads(client) == before + 1


@pytest.mark.spec("HP-PLC-8")
def test_who_was_asked_for_and_has_answered_may_leave(client: httpx.Client, folder: Path) -> None:
    """A model that a conversation had to ask for first is as idle as any other once it has answered: another one gets
    its room with the next settlement, not when the asking is forgotten."""
    one, other = a_model(folder, "asked"), a_model(folder, "after")
    body = {"model_ref": ref(one), "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}
    assert client.post("/v1/tasks", json=body).status_code == 503
    until(lambda: is_ready(client, ref(one)))
    assert finish(client, **body)[-1].event == "end"
    waiting = submit(client, model_ref=ref(other), max_tokens=8)["task_id"]
    assert not is_ready(client, ref(one))
    assert stream(client, waiting)[-1].event == "end"


@pytest.mark.spec("HP-ERR-3", "HP-PLC-8")
def test_the_command_line_waits_for_a_cold_model(folder: Path, llama_server: Path) -> None:
    """`run --chat` on a file that nobody has loaded, and that takes seconds to load, prints an answer and exits
    with 0."""
    model = a_model(folder, "cold")
    engines = {"llamacpp": {"launcher": "binary", "binary": str(llama_server)}}
    command = [sys.executable, "-P", "-m", "llama_orch.cli", "run", "--chat", "--model", ref(model), "Hello"]
    with live_service(settings(folder, engines=engines)) as service, held_load(model) as go:
        env = {**os.environ, "LLORCH_URL": service.url, "LLORCH_API_TOKEN": service.token}
        with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            until(lambda: bool(seconds_of_log(service, "task refused")))
            began = time.monotonic()
            until(lambda: time.monotonic() - began > 3 or process.poll() is not None)
            go()
            said, errors = process.communicate(timeout=LIMIT_S)
        assert (process.returncode, bool(said.strip())) == (0, True), errors


@pytest.mark.spec("HP-ADM-5", "HP-PLC-8")
def test_starts_are_predicted_once_they_were_measured_and_models_leave_when_nobody_uses_them(folder: Path) -> None:
    """Null for a model that was never loaded; a number, the load included, for one that was unloaded after its
    keep-alive and has to be loaded again. Unloaded means: no memory, no process."""
    model = a_model(folder, "measured")
    with live_service(settings(folder, on_demand={"keep_alive_ms": 500})) as service, open_client(service) as client:
        assert submit(client, model_ref=ref(model), max_tokens=8)["predicted_start_ms"] is None
        assert finish(client, model_ref=ref(model), max_tokens=8)[-1].event == "end"
        until(lambda: not is_ready(client, ref(model)))
        pool_id = pools(client)[ref(model)]["id"]
        until(lambda: health(client, pool_id)["replicas"][0]["state"] == "unloaded")
        assert total(client, "replica_evictions_total", pool_id=pool_id, reason="idle") == 1
        assert (reserved(client), workers(service)) == ({"card": 0}, {})
        again = submit(client, model_ref=ref(model), max_tokens=8)
        (load_ms,) = [line["load_ms"] for line in service.log() if "load_ms" in line]
        assert again["predicted_start_ms"] >= load_ms / 2
        assert stream(client, again["task_id"])[-1].event == "end"


@pytest.mark.spec("HP-PLC-8")
def test_who_has_only_just_come_stays_for_a_while(folder: Path) -> None:
    """An idle model keeps its room for `min_residency_ms`, whoever waits for it."""
    one, other = a_model(folder, "new"), a_model(folder, "next")
    with (
        live_service(settings(folder, on_demand={"min_residency_ms": 8000})) as service,
        open_client(service) as client,
    ):
        assert finish(client, model_ref=ref(one), max_tokens=8)[-1].event == "end"
        waiting = submit(client, model_ref=ref(other), max_tokens=8)["task_id"]
        why = "MiB are needed on device card, which has"
        assert why in health(client, pools(client)[ref(other)]["id"])["last_error"]
        assert stream(client, waiting)[-1].event == "end"
        (came,) = seconds_of_log(service, f"replica {pools(client)[ref(one)]['id']}-0 is ready")
        (left,) = seconds_of_log(service, "is unloaded: evicted")
        assert 7.99 <= (left - came) % 86400 < 30.0  # the log rounds


@pytest.mark.spec("HP-PLC-8")
def test_the_model_goes_that_is_cheapest_to_have_again(folder: Path, llama_server: Path) -> None:
    """Two cards with an idle model each, of which one took long to load: a third model goes where the other one is,
    though that was used last."""
    slow, quick, third = (a_model(folder, name) for name in ("slow", "quick", "third"))
    cards = {"devices": simulated(card=ROOM_FOR_ONE, spare=ROOM_FOR_ONE)}
    engines = {"llamacpp": {"launcher": "binary", "binary": str(llama_server)}}
    with live_service(settings(folder, engines=engines, **cards)) as service, open_client(service) as client:
        began = time.monotonic()
        assert finish(client, model_ref=ref(quick), max_tokens=4)[-1].event == "end"
        took_s = time.monotonic() - began
        with held_load(slow) as go:
            waiting = submit(client, model_ref=ref(slow), max_tokens=4)["task_id"]
            until(lambda: time.monotonic() - began > 2.5 * took_s)
            go()
            assert stream(client, waiting)[-1].event == "end"
        assert finish(client, model_ref=ref(quick), max_tokens=4)[-1].event == "end"
        assert finish(client, model_ref=ref(third), max_tokens=4)[-1].event == "end"
        assert [is_ready(client, ref(model)) for model in (slow, quick, third)] == [True, False, True]


@pytest.mark.spec("HP-PLC-8")
def test_a_load_holds_up_nobody_else(folder: Path, llama_server: Path) -> None:
    """While one model loads, another one is loaded, answers, and is listed; the task that waits can be canceled."""
    slow, quick = a_model(folder, "endless"), a_model(folder, "swift")
    cards = {"devices": simulated(card=ROOM_FOR_ONE, spare=ROOM_FOR_ONE)}
    engines = {"llamacpp": {"launcher": "binary", "binary": str(llama_server)}}
    with live_service(settings(folder, engines=engines, **cards)) as service, open_client(service) as client:
        with held_load(slow):
            waiting = submit(client, model_ref=ref(slow), max_tokens=4)["task_id"]
            for _ in range(3):
                assert finish(client, model_ref=ref(quick), max_tokens=4)[-1].event == "end"
            assert task(client, waiting)["state"] == "queued"
            assert client.post(f"/v1/tasks/{waiting}/cancel").status_code == 204
            assert stream(client, waiting)[-1].data["code"] == "CANCELED"
        until(lambda: is_ready(client, ref(slow)))  # it was on its way, and comes
