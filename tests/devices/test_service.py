"""The real service on a machine whose driver reports two cards. Nothing computes on them: they are not there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.live.client import descendants, finish, open_client, until
from tests.live_service import LiveService, ServiceFailed, live_service

from .machine import LOST, MIB, FakeCard, FakeMachine

pytestmark = pytest.mark.xdist_group("live")

# Takes llama-server's place: says its version, else loads for ever.
STAND_IN = """#!/bin/sh
case "$*" in *--version*) echo "version: 11549 (64fbe0f)"; exit;; esac
exec tail -f /dev/null
"""


def _declared(machine: FakeMachine) -> list[dict[str, Any]]:
    return [{"id": "large", "uuid": machine.large.uuid}, {"id": "small", "uuid": machine.small.uuid}]


def _devices(client: httpx.Client) -> dict[str, dict[str, Any]]:
    return {device["id"]: device for device in client.get("/v1/capabilities").json()["devices"]}


def _shown(card: FakeCard, device_id: str, reserved_bytes: int) -> dict[str, Any]:
    return {
        "id": device_id,
        "name": card.name,
        "backend": "cuda",
        "vram_total_bytes": card.total_mib * MIB,
        "vram_free_bytes": min(card.free_bytes, card.total_mib * MIB - reserved_bytes),
        "vram_reserved_bytes": reserved_bytes,
        "problem": None,
    }


@pytest.mark.spec("HP-DIS-1")
def test_engines_without_cuda_serve_on_the_cpu(machine: FakeMachine) -> None:
    """Two cards and llama.cpp's CPU build: the service warns, lists the CPU alone, and a task runs."""
    with live_service({"pools": [{"id": "default", "ctx": 512}]}, env=machine.environment) as service:
        with open_client(service) as client:
            assert [device["backend"] for device in _devices(client).values()] == ["cpu"]
            assert finish(client, max_tokens=4)[-1].event == "end"
        warnings = [line["message"] for line in service.log() if line["level"] == "warning"]
        assert "the installed engines have no CUDA: models run on the CPU" in warnings


@pytest.mark.spec("HP-DIS-1", "HP-PLC-6")
def test_capabilities_follow_the_cards(machine: FakeMachine) -> None:
    """Both declared cards with totals and free bytes, the lesser of what the driver and what the ledger has; a lost one
    has nothing free, and a problem."""
    pools = [{"id": one, "engine": "simulated", "devices": [one]} for one in ("large", "small")]
    with (
        live_service({"devices": _declared(machine), "pools": pools}, env=machine.environment) as service,
        open_client(service) as client,
    ):
        reserved = {}
        for pool in ("large", "small"):
            (replica,) = client.get(f"/v1/pools/{pool}/health").json()["replicas"]
            assert replica["devices"] == [pool]
            reserved[pool] = replica["vram_reserved_bytes"]
        cards = {"large": machine.large, "small": machine.small}
        assert _devices(client) == {name: _shown(card, name, reserved[name]) for name, card in cards.items()}
        machine.small.used_mib += 8000
        machine.apply()
        until(lambda: _devices(client)["small"]["vram_free_bytes"] == machine.small.free_bytes)
        machine.large.code = LOST
        machine.apply()
        until(lambda: _devices(client)["large"]["problem"] == "GPU is lost")
        large, small = _devices(client)["large"], _devices(client)["small"]
        assert (large["vram_free_bytes"], large["vram_total_bytes"]) == (0, machine.large.total_mib * MIB)
        assert (small["vram_free_bytes"], small["problem"]) == (machine.small.free_bytes, None)


@pytest.mark.spec("HP-PLC-6")
def test_a_worker_sees_the_cards_of_its_mask_and_no_other(machine: FakeMachine, tmp_path: Path) -> None:
    """Pools on one card and on both: their workers' environments name these UUIDs, in the mask's order."""
    binary = tmp_path / "llama-server"
    binary.write_text(STAND_IN)
    binary.chmod(0o755)
    settings = {
        "devices": _declared(machine),
        "engines": {"llamacpp": {"launcher": "binary", "binary": str(binary)}},
        "pools": [
            {"id": "one", "devices": ["small"]},
            {"id": "both", "devices": ["large", "small"], "tensor_split": [2, 1]},
        ],
    }
    expected = {machine.small.uuid, f"{machine.large.uuid},{machine.small.uuid}"}
    inherited = machine.environment | {"CUDA_VISIBLE_DEVICES": "0"}
    with live_service(settings, env=inherited) as service:
        until(lambda: {e.get("CUDA_VISIBLE_DEVICES") for e in _binaries(service)} == expected)
        assert {environment["CUDA_DEVICE_ORDER"] for environment in _binaries(service)} == {"PCI_BUS_ID"}


@pytest.mark.spec("HP-PLC-6")
def test_parts_of_one_card_are_devices_of_their_own(machine: FakeMachine, tmp_path: Path) -> None:
    """One 24 GiB card as 16 + 8 GiB: capabilities list both, and the workers on either see that one card."""
    binary = tmp_path / "llama-server"
    binary.write_text(STAND_IN)
    binary.chmod(0o755)
    sizes = {"big": 16384 * MIB, "little": 8192 * MIB}
    settings = {
        "devices": [{"id": name, "uuid": machine.large.uuid, "vram_bytes": size} for name, size in sizes.items()],
        "engines": {"llamacpp": {"launcher": "binary", "binary": str(binary)}},
    }
    with live_service(settings, env=machine.environment) as service, open_client(service) as client:
        until(lambda: [one.get("CUDA_VISIBLE_DEVICES") for one in _binaries(service)] == [machine.large.uuid] * 2)
        assert {name: device["vram_total_bytes"] for name, device in _devices(client).items()} == sizes
        replicas = client.get("/v1/pools/default/health").json()["replicas"]
        assert [replica["devices"] for replica in replicas] == [["big"], ["little"]]


def _binaries(service: LiveService) -> list[dict[str, str]]:
    """The environments of the engines' processes."""
    found = []
    for pid in descendants(service.pid):
        try:
            is_ours = Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"tail\0")
            entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if is_ours:
            found.append(dict(os.fsdecode(entry).partition("=")[::2] for entry in entries if entry))
    return found


def test_a_card_that_is_not_there_stops_the_start(machine: FakeMachine) -> None:
    """A device with an unknown UUID: the service does not start, and says which cards there are."""
    settings = {"devices": [{"id": "a", "uuid": "GPU-x"}], "pools": [{"id": "p", "engine": "simulated"}]}
    with (
        pytest.raises(ServiceFailed, match=f"no card with UUID GPU-x.*{machine.large.uuid}"),
        live_service(settings, env=machine.environment),
    ):
        pass
