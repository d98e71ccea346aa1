"""Cards that get lost, a driver that goes away, memory that others take: with real workers on a driver that is not."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from llama_orch.runtime.keeper import DEVICES_FRESH_S
from tests.devices.machine import DRIVER_NOT_LOADED, LOST, MIB, OK, FakeCard, FakeMachine
from tests.engines.conftest import a_llama_server
from tests.live.client import descendants, finish, open_client, stream, submit, until
from tests.live.models import (
    a_model,
    devices,
    health,
    held_load,
    is_ready,
    long_task,
    pools,
    ref,
    samples,
    states,
    task,
)
from tests.live_service import LiveService, live_service

pytestmark = pytest.mark.xdist_group("cards in trouble")

PROCESS_MIB = 700  # what the driver is made to say of a worker


def settings(machine: FakeMachine, folder: Path, **pool: Any) -> dict[str, Any]:
    """Both cards, one pool that may use either, and files of this folder."""
    return {
        "devices": [{"id": "large", "uuid": machine.large.uuid}, {"id": "small", "uuid": machine.small.uuid}],
        "engines": {"llamacpp": {"launcher": "binary", "binary": str(a_llama_server(folder))}},
        "pools": [{"id": "default", "slots": 2} | pool],
        "catalog": {"file_roots": [str(folder)]},
        "on_demand": {"min_residency_ms": 0},
    }


@pytest.fixture(scope="module")
def shared_machine(nvml_library: Path, tmp_path_factory: pytest.TempPathFactory) -> FakeMachine:
    return FakeMachine(nvml_library, tmp_path_factory.mktemp("machine") / "state")


@pytest.fixture(scope="module")
def running(shared_machine: FakeMachine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveService]:
    folder = tmp_path_factory.mktemp("models")
    with live_service(settings(shared_machine, folder), env=shared_machine.environment) as service:
        yield service


@pytest.fixture
def client(running: LiveService, shared_machine: FakeMachine) -> Iterator[httpx.Client]:
    """Both cards are sound and serve when the test begins."""
    with open_client(running) as client:
        until(lambda: states(client, "default") == {"large": "ready", "small": "ready"})
        yield client
        set_codes(shared_machine, OK, *shared_machine.cards)


def set_codes(machine: FakeMachine, code: int, *cards: FakeCard) -> None:
    machine.driver = OK
    for card in cards:
        card.code = code
    machine.apply()


def two_on_two_cards(client: httpx.Client) -> dict[str, str]:
    """Two long tasks that run, by their cards. No speeds are known, or one could rather wait for the other's card: the
    tests leave few tasks to be measured."""
    ids = [long_task(client), long_task(client)]
    until(lambda: all(task(client, one)["state"] == "running" for one in ids))
    cards = {r["id"]: r["devices"][0] for r in health(client, "default")["replicas"]}
    found = {cards[task(client, one)["replica_id"]]: one for one in ids}
    assert found.keys() == {"large", "small"}
    return found


def tokens_go_on(client: httpx.Client, task_id: str) -> None:
    until(lambda: task(client, task_id)["state"] != "queued")
    before = task(client, task_id)["tokens_out"]

    def has_gone_on() -> bool:
        now = task(client, task_id)
        assert now["state"] == "running", now["error"]
        return bool(now["tokens_out"] > before + 50)

    until(has_gone_on)


@pytest.mark.attack(17)
@pytest.mark.spec("HP-PLC-7", "HP-DIS-1", "HP-ERR-4")
def test_a_card_is_lost_while_tasks_run_on_both(client: httpx.Client, shared_machine: FakeMachine) -> None:
    """Its task ends with WORKER_RESET and the other one goes on; capabilities tell the problem; newcomers are served
    by the other card; when the card is back, so is its replica."""
    on_cards = two_on_two_cards(client)
    doomed, spared = on_cards["large"], on_cards["small"]
    set_codes(shared_machine, LOST, shared_machine.large)
    last = stream(client, doomed)[-1]
    assert (last.event, last.data["code"], last.data["retriable"]) == ("error", "WORKER_RESET", True)
    assert "GPU is lost" in last.data["message"]
    tokens_go_on(client, spared)
    large = devices(client)["large"]
    assert (large["vram_free_bytes"], large["problem"]) == (0, "GPU is lost")
    assert states(client, "default")["large"] != "ready"
    client.post(f"/v1/tasks/{spared}/cancel")
    newcomer = long_task(client)
    tokens_go_on(client, newcomer)
    client.post(f"/v1/tasks/{newcomer}/cancel")
    set_codes(shared_machine, OK, shared_machine.large)
    until(lambda: states(client, "default") == {"large": "ready", "small": "ready"})
    assert devices(client)["large"]["problem"] is None
    for one in two_on_two_cards(client).values():
        client.post(f"/v1/tasks/{one}/cancel")


@pytest.mark.spec("HP-PLC-7", "HP-ERR-4")
def test_both_cards_are_lost(client: httpx.Client, shared_machine: FakeMachine, running: LiveService) -> None:
    """What runs ends with WORKER_RESET, what waits with POOL_UNAVAILABLE, newcomers are told so at once; the service is
    up, and serves again when the cards are back."""
    on_cards = two_on_two_cards(client)
    waiting = submit(client, max_tokens=8)["task_id"]
    set_codes(shared_machine, LOST, *shared_machine.cards)
    assert [stream(client, one)[-1].data["code"] for one in on_cards.values()] == ["WORKER_RESET"] * 2
    assert stream(client, waiting)[-1].data["code"] == "POOL_UNAVAILABLE"
    refused = client.post("/v1/tasks", json={"model_ref": "builtin:tiny", "prompt": "Once"})
    assert (refused.status_code, refused.json()["code"]) == (503, "POOL_UNAVAILABLE")
    assert int(refused.headers["Retry-After"]) >= 1
    assert client.get("/healthz").status_code == 200
    set_codes(shared_machine, OK, *shared_machine.cards)
    until(lambda: states(client, "default") == {"large": "ready", "small": "ready"})
    assert finish(client, max_tokens=4)[-1].event == "end"


@pytest.mark.spec("HP-PLC-7")
def test_a_card_is_lost_while_nothing_runs(client: httpx.Client, shared_machine: FakeMachine) -> None:
    """It is noticed without a task's help: its replica is not ready any more."""
    set_codes(shared_machine, LOST, shared_machine.small)
    until(lambda: states(client, "default")["small"] != "ready", limit_s=15)
    assert states(client, "default")["large"] == "ready"
    assert health(client, "default")["ready"]


@pytest.mark.spec("HP-PLC-7")
def test_the_driver_goes_away(client: httpx.Client, shared_machine: FakeMachine, running: LiveService) -> None:
    """What is loaded serves on, since the cards may be sound; nothing more is loaded, which a task that waits for it is
    told, until the driver is back."""
    model = a_model(_folder(running), "later")
    on_cards = two_on_two_cards(client)
    shared_machine.driver = DRIVER_NOT_LOADED
    shared_machine.apply()
    let_it_be_seen()
    assert None not in [device["problem"] for device in devices(client).values()]
    waiting = submit(client, model_ref=ref(model), max_tokens=4)["task_id"]
    for one in on_cards.values():
        tokens_go_on(client, one)
    assert "cannot be used" in health(client, pools(client)[ref(model)]["id"])["last_error"]
    assert task(client, waiting)["state"] == "queued"
    assert states(client, "default") == {"large": "ready", "small": "ready"}
    shared_machine.driver = OK
    shared_machine.apply()
    assert stream(client, waiting)[-1].event == "end"
    for one in on_cards.values():
        tokens_go_on(client, one)
        client.post(f"/v1/tasks/{one}/cancel")


def _folder(service: LiveService) -> Path:
    """Where the service may take models from, as its configuration says."""
    config = json.loads(service.home.with_name("config.yaml").read_text())
    return Path(config["catalog"]["file_roots"][0])


@pytest.mark.spec("HP-PLC-5", "HP-PLC-8")
def test_memory_that_another_program_takes(machine: FakeMachine, tmp_path: Path) -> None:
    """The next load goes to the other card; where both are full it waits, with the figures, until there is room."""
    models = [a_model(tmp_path, name) for name in ("first", "second")]
    with (
        live_service(settings(machine, tmp_path, keep_alive_ms=60_000), env=machine.environment) as service,
        open_client(service) as client,
    ):
        take(machine, machine.large)
        assert finish(client, model_ref=ref(models[0]), max_tokens=4)[-1].event == "end"
        pool_id = pools(client)[ref(models[0])]["id"]
        assert states(client, pool_id) == {"large": "unloaded", "small": "ready"}
        running = long_task(client, model_ref=ref(models[0]))
        until(lambda: task(client, running)["state"] == "running")
        take(machine, machine.small)
        waiting = submit(client, model_ref=ref(models[1]), max_tokens=4)["task_id"]
        assert "are needed on device large" in health(client, _pool(client, models[1]))["last_error"]
        tokens_go_on(client, running)
        assert task(client, waiting)["state"] == "queued"
        machine.large.used_mib = 300
        machine.apply()
        assert stream(client, waiting)[-1].event == "end"
        assert states(client, _pool(client, models[1]))["large"] == "ready"


def take(machine: FakeMachine, card: FakeCard) -> None:
    """Another program takes all but a little of the card."""
    card.used_mib = card.total_mib - 100
    machine.apply()
    let_it_be_seen()


def let_it_be_seen() -> None:
    """What the service decides by may be as old as that."""
    since = time.monotonic()
    until(lambda: time.monotonic() - since > 2 * DEVICES_FRESH_S)


def _pool(client: httpx.Client, model: Path) -> str:
    pool_id: str = pools(client)[ref(model)]["id"]
    return pool_id


@pytest.mark.spec("HP-PLC-5", "HP-PLC-7")
def test_a_load_that_runs_out_of_memory(machine: FakeMachine, tmp_path: Path) -> None:
    """The card had less room than anybody knew: the task is answered by the other card, and the reason is told."""
    model = a_model(tmp_path, "large")
    Path(f"{model}.full").write_text(machine.large.uuid)
    with (
        live_service(settings(machine, tmp_path, keep_alive_ms=60_000), env=machine.environment) as service,
        open_client(service) as client,
    ):
        assert finish(client, model_ref=ref(model), max_tokens=4)[-1].event == "end"
        assert states(client, _pool(client, model)) == {"large": "unloaded", "small": "ready"}  # not tried again
        replicas = {r["devices"][0]: r for r in health(client, _pool(client, model))["replicas"]}
        assert "out of memory" in replicas["large"]["last_error"]


@pytest.mark.spec("HP-OBS-1", "HP-PLC-5", "HP-PLC-8")
def test_what_the_driver_says_of_a_worker_counts(machine: FakeMachine, tmp_path: Path) -> None:
    """Its memory is what the replica has reserved, and what /metrics shows at any time, with the card's utilization;
    when the model leaves, the return of that memory is seen before it is given away again."""
    model = a_model(tmp_path, "told")
    pool = {"model": ref(model), "devices": ["large"]}
    with (
        held_load(model) as go,
        live_service(settings(machine, tmp_path, **pool), env=machine.environment) as service,
        open_client(service) as client,
    ):
        until(lambda: _binary(service) is not None)
        say(machine, _binary(service), PROCESS_MIB)
        go()
        until(lambda: is_ready(client, ref(model)))
        (replica,) = health(client, "default")["replicas"]
        assert replica["vram_reserved_bytes"] == PROCESS_MIB * MIB
        (sample,) = samples(client, "vram_used_bytes")
        assert (sample[0]["device"], sample[1]) == ("large", PROCESS_MIB * MIB)
        say(machine, _binary(service), PROCESS_MIB + 50)
        until(lambda: [value for _, value in samples(client, "vram_used_bytes")] == [(PROCESS_MIB + 50) * MIB])
        assert [value for _, value in samples(client, "gpu_utilization")] == [0.37]
        client.post("/v1/pools/default/drain", json={"deadline_ms": 0})
        until(lambda: _binary(service) is None)
        assert states(client, "default") == {"large": "unloading"}
        say(machine, None, 0)
        until(lambda: states(client, "default") == {"large": "unloaded"})
        assert any(line["message"].startswith("the memory of default-0 was back after") for line in service.log())


def say(machine: FakeMachine, pid: int | None, mib: int) -> None:
    """What the driver tells of the large card: this process with so much memory, and 300 MiB beside it."""
    machine.processes = [] if pid is None else [(machine.large, pid, mib)]
    machine.large.used_mib = 300 + mib
    machine.apply()


def _binary(service: LiveService) -> int | None:
    """The process of the one `llama-server` that runs."""
    for pid in descendants(service.pid):
        try:
            if b"--slot-save-path" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
        except OSError:
            continue
    return None
