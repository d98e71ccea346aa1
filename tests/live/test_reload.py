"""Another model in a pool's place: beside the old one where there is room, else after it, and never neither."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.live.client import finish, open_client, stream, submit, until, workers
from tests.live.models import (
    ROOM_FOR_ONE,
    ROOM_FOR_TWO,
    a_model,
    digest,
    health,
    held_load,
    long_task,
    of_unknown_architecture,
    pools,
    ref,
    reserved,
    simulated,
    task,
)
from tests.live_service import LiveService, live_service
from tests.runtime.frames import Seen

pytestmark = pytest.mark.xdist_group("drain and reload")


@contextmanager
def serving(model: Path, llama_server: Path, room: int, **pool: Any) -> Iterator[tuple[LiveService, httpx.Client]]:
    """A pool `default` on this model, which serves, on a card with so much room."""
    settings = {
        "devices": simulated(card=room),
        "engines": {"llamacpp": {"launcher": "binary", "binary": str(llama_server)}},
        "pools": [{"id": "default", "model": ref(model), "slots": 1, "ctx": 2048} | pool],
        "catalog": {"file_roots": [str(model.parent)]},
        "on_demand": {"min_residency_ms": 0},
    }
    with live_service(settings) as service, open_client(service) as client:
        until(lambda: health(client, "default")["ready"] or "keep_alive_ms" in pool)
        yield service, client


def reload(client: httpx.Client, model: Path, pool_id: str = "default") -> str:
    """What health says of it at first."""
    answer = client.post(f"/v1/pools/{pool_id}/reload", json={"new_model_ref": ref(model)})
    assert answer.status_code == 202, answer.text
    return str(answer.json()["last_reload"])


def outcome(client: httpx.Client, pool_id: str = "default") -> str:
    until(lambda: str(health(client, pool_id)["last_reload"]).startswith(("done: ", "failed: ")))
    return str(health(client, pool_id)["last_reload"])


def answered_by(last: Seen) -> tuple[str, str]:
    return last.event, last.data.get("model_digest", "")


@pytest.mark.spec("HP-CTL-2")
def test_beside_the_old_model(tmp_path: Path, llama_server: Path) -> None:
    """A stream that runs goes on to its end on the old model, and so does a task that comes during the load; a second
    reload is a conflict meanwhile; what comes afterwards gets the new model, and the old one's memory is given back."""
    old, new = a_model(tmp_path, "old"), a_model(tmp_path, "new")
    with serving(old, llama_server, ROOM_FOR_TWO, slots=2) as (service, client):
        running = long_task(client, model_ref=ref(old), prompts=2, determinism="best_effort")
        with held_load(new) as go:
            assert reload(client, new).startswith("loading ")
            again = client.post("/v1/pools/default/reload", json={"new_model_ref": ref(new)})
            assert (again.status_code, again.json()["code"]) == (409, "CONFLICT")
            during = finish(client, model_ref=ref(old), max_tokens=8, determinism="best_effort")
            assert answered_by(during[-1]) == ("end", digest(old))
            go()
            assert outcome(client).startswith("done: ")
        assert answered_by(finish(client, model_ref=ref(new), max_tokens=8)[-1]) == ("end", digest(new))
        assert answered_by(stream(client, running)[-1]) == ("end", digest(old))
        until(lambda: [r["state"] for r in health(client, "default")["replicas"]] == ["ready"])
        (left,) = health(client, "default")["replicas"]
        assert reserved(client) == {"card": left["vram_reserved_bytes"]}
        assert len(workers(service)) == 1


@pytest.mark.spec("HP-CTL-2", "HP-ERR-2")
def test_in_place_of_the_old_model(tmp_path: Path, llama_server: Path) -> None:
    """Without room for both: what runs and what waits finishes on the old model, newcomers are told to come back, and
    then the new model serves."""
    old, new = a_model(tmp_path, "old"), a_model(tmp_path, "new")
    with serving(old, llama_server, ROOM_FOR_ONE) as (_, client):
        running = long_task(client, model_ref=ref(old), prompts=2)
        waiting = submit(client, model_ref=ref(old), max_tokens=8)["task_id"]
        until(lambda: task(client, running)["state"] == "running")
        assert reload(client, new).startswith("waiting ")
        refused = client.post("/v1/tasks", json={"model_ref": ref(old), "prompt": "Once"})
        assert (refused.status_code, refused.json()["code"]) == (503, "POOL_UNREADY")
        assert int(refused.headers["Retry-After"]) >= 1
        for one in (running, waiting):
            assert answered_by(stream(client, one)[-1]) == ("end", digest(old))
        assert outcome(client).startswith("done: ")
        assert answered_by(finish(client, model_ref=ref(new), max_tokens=8)[-1]) == ("end", digest(new))
        assert pools(client)[ref(new)]["model_digest"] == digest(new)


@pytest.mark.spec("HP-CTL-2")
@pytest.mark.parametrize("room", [ROOM_FOR_TWO, ROOM_FOR_ONE], ids=["beside", "in place"])
def test_a_new_model_that_does_not_load(tmp_path: Path, llama_server: Path, room: int) -> None:
    """The outcome says what the engine said of it, and the old model serves: it still does, or does again."""
    old, strange = a_model(tmp_path, "old"), a_model(tmp_path, "strange", of_unknown_architecture())
    with serving(old, llama_server, room) as (service, client):
        before = workers(service)
        assert reload(client, strange)
        said = outcome(client)
        assert said.startswith("failed: ")
        assert "unknown model architecture: 'llamx'" in said
        assert answered_by(finish(client, model_ref=ref(old), max_tokens=8)[-1]) == ("end", digest(old))
        until(lambda: len(health(client, "default")["replicas"]) == 1)
        assert len(workers(service)) == 1
        assert (workers(service) == before) == (room == ROOM_FOR_TWO)
        answer = client.post("/v1/tasks", json={"model_ref": ref(old), "prompt": "Once", "max_tokens": 4})
        assert answer.status_code == 202


@pytest.mark.spec("HP-CTL-2", "HP-PLC-7")
def test_a_reload_ends_a_quarantine(tmp_path: Path, llama_server: Path) -> None:
    """A pool whose model never loads is given up; with another model it serves."""
    strange, new = a_model(tmp_path, "strange", of_unknown_architecture()), a_model(tmp_path, "new")
    with serving(strange, llama_server, ROOM_FOR_ONE, keep_alive_ms=60_000) as (_, client):
        doomed = submit(client, model_ref=ref(strange), max_tokens=8)["task_id"]
        assert stream(client, doomed)[-1].data["code"] == "POOL_UNAVAILABLE"
        assert not health(client, "default")["live"]
        reload(client, new)
        assert outcome(client).startswith("done: ")
        assert answered_by(finish(client, model_ref=ref(new), max_tokens=8)[-1]) == ("end", digest(new))
        assert (health(client, "default")["live"], health(client, "default")["last_error"]) == (True, None)


@pytest.mark.spec("HP-CTL-2")
def test_a_pool_of_the_other_engine(tmp_path: Path, llama_server: Path) -> None:
    """ctransformers pools are reloaded like others."""
    old, new = a_model(tmp_path, "old"), a_model(tmp_path, "new")
    with serving(old, llama_server, ROOM_FOR_TWO, engine="ctransformers") as (_, client):
        assert answered_by(finish(client, model_ref=ref(old), max_tokens=8)[-1]) == ("end", digest(old))
        reload(client, new)
        assert outcome(client).startswith("done: ")
        last = finish(client, model_ref=ref(new), max_tokens=8)[-1]
        assert (*answered_by(last), last.data["engine"]) == ("end", digest(new), "ctransformers")


@pytest.mark.spec("HP-CTL-2", "HP-PLC-8")
def test_a_pool_on_demand_that_was_reloaded(tmp_path: Path, llama_server: Path) -> None:
    """A task that names its first model again gets that model, in a pool of its own, and not the one that took its
    place."""
    house, first, second = (a_model(tmp_path, name) for name in ("house", "first", "second"))
    with serving(house, llama_server, ROOM_FOR_ONE, keep_alive_ms=60_000) as (_, client):
        assert answered_by(finish(client, model_ref=ref(first), max_tokens=8)[-1]) == ("end", digest(first))
        pool_id = pools(client)[ref(first)]["id"]
        reload(client, second, pool_id)
        assert outcome(client, pool_id).startswith("done: ")
        for model in (first, second):
            assert answered_by(finish(client, model_ref=ref(model), max_tokens=8)[-1]) == ("end", digest(model))
        assert pools(client)[ref(first)]["id"] != pools(client)[ref(second)]["id"]
