"""Two unequal cards and nothing pinned by hand: both are busy, neither is oversold, and the service says so."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.live.client import open_client, stream, submit, until
from tests.live.models import devices, health, long_task, reserved, samples, states, task
from tests.live_service import live_service

pytestmark = pytest.mark.xdist_group("two cards")

GIB = 1 << 30
SIZES = {"3090": 24 * GIB, "3060": 12 * GIB}
CARDS = [{"id": name, "backend": "simulated", "vram_bytes": size} for name, size in SIZES.items()]
LABELS = {"engine", "engine_version", "pool_id", "replica_id", "device"}


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    """A service on both cards, with one pool that may use all of them."""
    with live_service({"devices": CARDS, "pools": [{"id": "default"}]}) as service, open_client(service) as client:
        until(lambda: set(states(client, "default").values()) == {"ready"})
        yield client


def _running(client: httpx.Client, *task_ids: str) -> list[dict[str, Any]]:
    """The tasks, once they all run."""
    until(lambda: all(task(client, one)["state"] == "running" for one in task_ids))
    return [task(client, one) for one in task_ids]


@pytest.mark.spec("HP-PLC-1", "HP-PLC-4")
def test_two_strict_tasks_run_on_both_cards_at_once(client: httpx.Client) -> None:
    """The first goes to the card with more to give, the second to the other one; each says why it is where it is."""
    ids = [long_task(client), long_task(client)]
    first, second = _running(client, *ids)
    assert [first["replica_id"], second["replica_id"]] == ["default-0", "default-1"]
    assert first["placement"].startswith("default-0 chosen of 2 (default-0: ")
    assert "; default-1: " in first["placement"]
    assert second["placement"].startswith("default-1 chosen of 1 ")
    assert [r["devices"] for r in health(client, "default")["replicas"]] == [["3090"], ["3060"]]
    for one in ids:
        assert client.post(f"/v1/tasks/{one}/cancel").status_code == 204


@pytest.mark.spec("HP-OBS-1", "HP-PLC-4")
def test_memory_and_utilization_are_told_per_replica_and_device(client: httpx.Client) -> None:
    """With exactly the labels of the profile: memory within each card's size, and a card's busy slots as its
    utilization, which are all of them under a strict task and none when nothing runs."""
    until(lambda: all(value == 0 for _, value in samples(client, "gpu_utilization")))
    ids = [long_task(client), long_task(client)]
    _running(client, *ids)
    for name in ("vram_used_bytes", "gpu_utilization"):
        assert all(labels.keys() == LABELS for labels, _ in samples(client, name))
    used = {labels["device"]: (labels["replica_id"], value) for labels, value in samples(client, "vram_used_bytes")}
    assert {device: replica for device, (replica, _) in used.items()} == {"3090": "default-0", "3060": "default-1"}
    assert all(0 < value <= SIZES[device] for device, (_, value) in used.items())
    assert [value for _, value in samples(client, "gpu_utilization")] == [1.0, 1.0]
    for one in ids:
        client.post(f"/v1/tasks/{one}/cancel")
    until(lambda: all(value == 0 for _, value in samples(client, "gpu_utilization")))


@pytest.mark.spec("HP-DIS-1", "HP-PLC-2", "HP-PLC-4")
def test_capabilities_tell_what_is_given_away_and_what_is_left(client: httpx.Client) -> None:
    """Reserved is what the replicas there take, free the rest, and nothing keeps models off the cards. A client that
    counts on one strict task per card is told so."""
    given = {r["devices"][0]: r["vram_reserved_bytes"] for r in health(client, "default")["replicas"]}
    assert reserved(client) == given
    for name, device in devices(client).items():
        assert device["vram_total_bytes"] == SIZES[name]
        assert device["vram_free_bytes"] == SIZES[name] - given[name]
        assert device["problem"] is None
    said = client.get("/v1/capabilities").json()
    assert said["concurrency"] == {"recommended": 2, "slots": 8}
    assert [pool["recommended_concurrency"] for pool in said["pools"]] == [2]


@pytest.mark.spec("HP-PLC-1", "HP-PLC-4")
def test_a_queue_of_strict_tasks_is_shared_by_the_cards(client: httpx.Client) -> None:
    """Twelve tasks that wait behind one another: all get their end, and both replicas had some of them."""
    ids = [long_task(client, prompts=2, seed=number) for number in range(12)]
    assert [stream(client, one)[-1].event for one in ids] == ["end"] * 12
    assert {task(client, one)["replica_id"] for one in ids} == {"default-0", "default-1"}


@pytest.mark.spec("HP-PLC-1")
def test_nobody_waits_while_both_cards_are_free(client: httpx.Client) -> None:
    """One strict task after the other, with the speeds of both cards known by now: whichever was measured to be the
    faster one, each task starts at once."""
    until(lambda: all(r["slots_busy"] == 0 for r in health(client, "default")["replicas"]))
    for _ in range(8):
        admission = submit(client, max_tokens=16)
        assert task(client, admission["task_id"])["state"] != "queued"
        assert stream(client, admission["task_id"])[-1].event == "end"
