"""Devices from settings and from the driver, and what a source says of each."""

from __future__ import annotations

from typing import Any

import pytest

from llama_orch.testing.rehearsal import sources_for

from .machine import DRIVER_NOT_LOADED, LOST, MIB, FakeMachine, Program


def _ids(answer: dict[str, Any]) -> list[tuple[str, str, str | None]]:
    return [(one["device_id"], one["backend"], one["uuid"]) for one in answer["sources"]]


@pytest.mark.spec("HP-PLC-6")
def test_auto_takes_every_card_by_its_uuid(machine: FakeMachine, program: Program) -> None:
    """With engines that can use CUDA the devices are the cards, and the engines were asked with the cards' UUIDs."""
    answer = program.ask("discover", settings="auto", can_use_cuda=True)
    assert _ids(answer) == [("gpu0", "cuda", machine.small.uuid), ("gpu1", "cuda", machine.large.uuid)]
    assert answer["asked"] == [[machine.small.uuid, machine.large.uuid]]
    assert answer["sources"][1]["vram_total_bytes"] == 24576 * MIB


def test_cards_without_cuda_engines_mean_the_cpu(machine: FakeMachine, program: Program) -> None:
    """Engines that cannot use the cards leave the CPU as the one device, with a warning that says why."""
    assert _ids(program.ask("discover", settings="auto", can_use_cuda=False)) == [("cpu", "cpu", None)]
    assert program.warnings() == ["the installed engines have no CUDA: models run on the CPU"]


def test_no_card_means_the_cpu(machine: FakeMachine, program: Program) -> None:
    """Without a driver the CPU is the one device, with a warning, and the engines are not asked."""
    machine.driver = DRIVER_NOT_LOADED
    machine.apply()
    answer = program.ask("discover", settings="auto", can_use_cuda=True)
    assert (_ids(answer), answer["asked"]) == ([("cpu", "cpu", None)], [])
    assert program.warnings() == ["no NVIDIA card was found: models run on the CPU"]


@pytest.mark.spec("HP-PLC-6")
def test_declared_cards_are_found_by_uuid(machine: FakeMachine, program: Program) -> None:
    """Declared in another order than the driver's, each device is the card of its UUID."""
    settings = [{"id": "large", "uuid": machine.large.uuid}, {"id": "small", "uuid": machine.small.uuid}]
    answer = program.ask("discover", settings=settings, can_use_cuda=False)
    assert _ids(answer) == [("large", "cuda", machine.large.uuid), ("small", "cuda", machine.small.uuid)]
    assert [one["name"] for one in answer["sources"]] == [machine.large.name, machine.small.name]


def test_a_declared_card_that_is_not_there(machine: FakeMachine, program: Program) -> None:
    """The error names the UUID that was asked for and those that there are."""
    answer = program.ask("discover", settings=[{"id": "a", "uuid": "GPU-x"}], can_use_cuda=True)
    found = f"{machine.small.uuid}, {machine.large.uuid}"
    assert answer["error"] == f"device a: no card with UUID GPU-x; the driver reports: {found}"


def test_a_source_follows_its_card(machine: FakeMachine, program: Program) -> None:
    """Free and used memory and utilisation are the card's, until it is lost: then nothing is free, the rest unknown."""
    program.ask("discover", settings="auto", can_use_cuda=True)
    machine.large.used_mib, machine.large.utilization = 20000, 100
    machine.apply()
    large = program.ask("sources", at=1.0)[1]
    assert (large["free"], large["used"], large["utilization"]) == (4576 * MIB, 20000 * MIB, 1.0)
    machine.large.code = LOST
    machine.apply()
    small, large = program.ask("sources", at=2.0)
    assert (large["free"], large["used"], large["utilization"]) == (0, None, None)
    assert small["free"] == machine.small.free_bytes


def test_a_device_without_a_driver_has_used_what_is_not_free() -> None:
    """A simulated device has no utilisation, and its used memory is the rest of its total."""
    source = sources_for(["3060"])[0]
    source.device.vram_free_bytes = source.device.vram_total_bytes - 5 * MIB
    assert (source.read_used_bytes(), source.read_utilization()) == (5 * MIB, None)
