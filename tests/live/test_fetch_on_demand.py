"""Tasks that have their model fetched (`on_demand.fetch`), on the real service and llama.cpp: from a hub that is played
on loopback."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.hub import Hub, a_hub
from tests.live.client import live_frames, open_client, stream, submit, until
from tests.live.test_fetch import CONTENT, MODELS, SHORT, digest
from tests.live_service import LiveService, live_service

pytestmark = [pytest.mark.xdist_group("catalog"), pytest.mark.spec("HP-PLC-8")]

SETTINGS: dict[str, Any] = {
    "pools": [{"id": "default", "ctx": 512, "slots": 1}],
    "on_demand": {"fetch": True},
    "policy": {"outbound": {"allow_private_addresses": True}},
}


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with a_hub(CONTENT) as hub:
        yield hub


@pytest.fixture(scope="module")
def service(hub: Hub) -> Iterator[LiveService]:
    with live_service(SETTINGS, env={"HF_ENDPOINT": hub.url}) as running:
        yield running


@pytest.fixture
def client(service: LiveService) -> Iterator[httpx.Client]:
    with open_client(service) as client:
        yield client


def held(hub: Hub) -> None:
    """The next file stops in its middle until the test has it go on."""
    hub.held.clear()
    hub.go_on.clear()
    hub.hold_after = len(CONTENT) // 2


def source(name: str) -> str:
    return f"hf:org/repo/{name}.gguf"


def times_asked(hub: Hub, name: str) -> int:
    return sum(path.startswith("/files/") and path.endswith(f"/{name}.gguf") for path, _ in hub.heard)


def entry_of(client: httpx.Client, name: str) -> dict[str, Any]:
    items = client.get(MODELS, params={"limit": 200}).json()["items"]
    (found,) = [one for one in items if one["source_url"] == source(name)]
    return found


def last_of(client: httpx.Client, task_id: str) -> Any:
    return stream(client, task_id)[-1]


@pytest.mark.spec("HP-ADM-5", "HP-STR-2", "HP-CTL-1")
def test_tasks_wait_for_their_model_and_share_its_fetch(hub: Hub, client: httpx.Client) -> None:
    """Their place in the queue is known and their start is not; one that is canceled takes nothing from the others."""
    held(hub)
    first = submit(client, model_ref=source("shared"), **SHORT)
    assert (first["queue_position"], first["predicted_start_ms"]) == (0, None)
    assert hub.held.wait(60)
    entry = entry_of(client, "shared")
    assert entry["fetch"]["state"] == "running"
    second, third = (submit(client, model_ref=name, **SHORT) for name in (entry["id"], source("shared")))
    assert {one["pool_id"] for one in (first, second, third)} == {first["pool_id"]}
    with live_frames(client, second["task_id"]) as frames:
        told = [next(frames) for _ in range(3)]
        assert [frame.event for frame in told] == ["started", "metrics", "metrics"]
        assert [frame.data["queue_position"] for frame in told] == [1, 1, 1]
        assert {frame.data["predicted_start_ms"] for frame in told} == {None}
    assert client.post(f"/v1/tasks/{first['task_id']}/cancel").status_code == 204
    assert last_of(client, first["task_id"]).data["code"] == "CANCELED"
    assert client.delete(f"{MODELS}/{entry['id']}").status_code == 409  # others wait for it
    hub.go_on.set()
    for admitted in (second, third):
        last = last_of(client, admitted["task_id"])
        assert (last.event, last.data.get("model_digest")) == ("end", digest(CONTENT))
    assert times_asked(hub, "shared") == 1
    assert entry_of(client, "shared")["fetch"]["state"] == "done"
    again = submit(client, model_ref=source("shared"), **SHORT)
    assert (last_of(client, again["task_id"]).event, again["pool_id"]) == ("end", first["pool_id"])


@pytest.mark.spec("HP-ERR-1")
def test_a_fetch_that_fails_ends_all_who_wait_for_it(hub: Hub, client: httpx.Client) -> None:
    """With its own error; nothing of it is left, and the next task begins anew."""
    held(hub)
    in_front = submit(client, model_ref=source("in-front"), **SHORT)
    assert hub.held.wait(60)
    tasks = [submit(client, model_ref=source("failing"), **SHORT) for _ in range(2)]
    hub.faults = [404]
    hub.go_on.set()
    for admitted in tasks:
        last = last_of(client, admitted["task_id"])
        assert (last.event, last.data["code"], last.data["retriable"]) == ("error", "UPSTREAM_FAILED", True)
        assert "404" in last.data["message"]
    assert last_of(client, in_front["task_id"]).event == "end"
    assert tasks[0]["pool_id"] not in {pool["id"] for pool in client.get("/v1/pools").json()["items"]}
    assert entry_of(client, "failing")["fetch"]["state"] == "failed"
    assert last_of(client, submit(client, model_ref=source("failing"), **SHORT)["task_id"]).event == "end"


@pytest.mark.spec("HP-ADM-7")
def test_what_is_wrong_for_the_model_is_told_as_soon_as_it_is_known(hub: Hub, client: httpx.Client) -> None:
    """A conversation is told when to come again; a missed deadline and what the model cannot do end as errors; who fits
    is served all the same."""
    held(hub)
    good = submit(client, model_ref=source("judged"), **SHORT)
    assert hub.held.wait(60)
    late = submit(client, model_ref=source("judged"), deadline_ms=200, **SHORT)
    vectors = submit(client, model_ref=source("judged"), workload="embedding", prompt="Once")
    chat = {"model_ref": source("judged"), "messages": [{"role": "user", "content": "Hi"}], **SHORT}
    answer = client.post("/v1/tasks", json=chat)
    assert (answer.status_code, answer.json()["code"]) == (503, "POOL_UNREADY")
    assert int(answer.headers["X-Backoff-Ms"]) > 0
    assert "to be fetched" in answer.json()["message"]
    assert last_of(client, late["task_id"]).data["code"] == "DEADLINE_UNMET"
    hub.go_on.set()
    assert last_of(client, good["task_id"]).event == "end"
    last = last_of(client, vectors["task_id"])
    assert (last.event, last.data["code"]) == ("error", "INVALID_PARAMS")
    assert client.post("/v1/tasks", json=chat).status_code == 202


@pytest.mark.spec("HP-CTL-1")
def test_a_model_that_was_fetched_for_a_task_can_be_deleted(
    hub: Hub, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under whatever name it was loaded, its pool goes with it, and the next task has it fetched again."""
    monkeypatch.setattr(hub, "content", CONTENT + b"and another model than the others")
    admitted = submit(client, model_ref=source("leaving"), **SHORT)
    assert last_of(client, admitted["task_id"]).event == "end"
    model_id = entry_of(client, "leaving")["id"]
    client.post(f"/v1/pools/{admitted['pool_id']}/drain", json={"deadline_ms": 0})
    until(lambda: client.delete(f"{MODELS}/{model_id}").status_code == 204)
    assert admitted["pool_id"] not in {pool["id"] for pool in client.get("/v1/pools").json()["items"]}
    assert last_of(client, submit(client, model_ref=source("leaving"), **SHORT)["task_id"]).event == "end"
    assert times_asked(hub, "leaving") == 2


@pytest.mark.attack(16)
@pytest.mark.spec("HP-SEC-7")
def test_what_a_url_was_signed_with_is_told_to_nobody(service: LiveService, client: httpx.Client) -> None:
    """But by the catalog, whose source it is: no pool, no other's refusal and no line of the log has it."""
    admitted = submit(client, model_ref="https://127.0.0.1:1/m.gguf?X-Signature=hunter2", **SHORT)
    (entry,) = [one for one in client.get(MODELS).json()["items"] if "hunter2" in one["source_url"]]
    others = [client.get("/v1/pools"), client.get("/v1/models"), client.get("/metrics"), client.get("/v1/tasks")]
    for reference in ("unknown", "https://user:hunter2@a.example/m.gguf", "file:/hunter3"):
        others.append(client.post("/v1/tasks", json={"model_ref": reference, "prompt": "Once"}))
    others.append(client.post(MODELS, json={"id": "x", "source_url": "https://user:hunter2@a.example/m.gguf"}))
    assert [answer.status_code for answer in others] == [200] * 4 + [404, 400, 404, 400]
    assert client.post(f"/v1/tasks/{admitted['task_id']}/cancel").status_code == 204
    assert client.delete(f"{MODELS}/{entry['id']}").status_code == 204
    assert not [answer.text for answer in others if "hunter2" in answer.text]
    assert "hunter2" not in service.log_path.read_text()


def test_a_reference_that_is_none_is_refused(client: httpx.Client) -> None:
    """Nothing is entered for it."""
    count = len(client.get(MODELS, params={"limit": 200}).json()["items"])
    for reference in (
        "hf:",
        "hf:org",
        "hf:org/repo/",
        "hf:org/../x.gguf",
        "hf:org/repo/a b.gguf",
        "https:",
        "https://",
    ):
        answer = client.post("/v1/tasks", json={"model_ref": reference, "prompt": "Once"})
        assert answer.status_code in (400, 403), answer.text
    assert len(client.get(MODELS, params={"limit": 200}).json()["items"]) == count
