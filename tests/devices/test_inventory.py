"""Devices from settings and from the driver, and what a source says of each."""

from __future__ import annotations

from typing import Any

import pytest

from llama_orch.testing.rehearsal import sources_for

from .machine import DRIVER_NOT_LOADED, LOST, MIB, NOT_SUPPORTED, OK, FakeCard, FakeMachine, Program


def _parts(card: FakeCard, **mib: int) -> list[dict[str, Any]]:
    """The card as several devices, each with its size."""
    return [{"id": name, "uuid": card.uuid, "vram_bytes": size * MIB} for name, size in mib.items()]


def _discover(program: Program, settings: Any = "auto") -> list[dict[str, Any]]:
    sources: list[dict[str, Any]] = program.ask("discover", settings=settings, can_use_cuda=True)["sources"]
    return sources


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


def test_a_declared_card_without_a_driver(machine: FakeMachine, program: Program) -> None:
    """The error says that the driver reports none: nothing falls back to the CPU where a card was asked for."""
    machine.driver = DRIVER_NOT_LOADED
    machine.apply()
    answer = program.ask("discover", settings=[{"id": "a", "uuid": machine.large.uuid}], can_use_cuda=True)
    assert answer["error"].endswith("the driver reports: none")


def test_one_card_as_two_devices(machine: FakeMachine, program: Program) -> None:
    """Two parts of the 3090 beside the 3060: each a device of its size, on the same card by its UUID."""
    settings = [*_parts(machine.large, big=14000, little=10000), {"id": "small", "uuid": machine.small.uuid}]
    sources = _discover(program, settings)
    assert [(one["device_id"], one["uuid"]) for one in sources] == [
        ("big", machine.large.uuid),
        ("little", machine.large.uuid),
        ("small", machine.small.uuid),
    ]
    assert [one["vram_total_bytes"] for one in sources] == [14000 * MIB, 10000 * MIB, 12288 * MIB]
    assert [one["free"] for one in sources] == [14000 * MIB, 10000 * MIB, machine.small.free_bytes]
    assert [one["vram_free_bytes"] for one in sources] == [one["free"] for one in sources]


def test_what_others_take_of_a_shared_card_is_free_on_no_part(machine: FakeMachine, program: Program) -> None:
    """Another program takes 16 GiB of the card, of which this service gave nothing away: every part has what is left,
    and no more than its size; each says what is used and computed on the whole card."""
    _discover(program, _parts(machine.large, big=16384, little=8192))
    machine.large.used_mib += 16384
    machine.processes = [(machine.large, 777, 16384)]
    machine.apply()
    big, little = program.ask("sources", at=1.0, pid=777)
    assert machine.large.free_bytes < 8192 * MIB
    for part in (big, little):
        assert part["free"] == machine.large.free_bytes
        assert (part["used"], part["utilization"]) == (machine.large.used_mib * MIB, 0.37)
        assert (part["process_bytes"], part["problem"]) == (16384 * MIB, None)


def test_parts_that_are_more_than_their_card(machine: FakeMachine, program: Program) -> None:
    """A start with 16 + 12 GiB on a card of 24 GiB is refused with the figures; the card's own size is not too much."""
    settings = _parts(machine.large, big=16384, little=12288)
    answer = program.ask("discover", settings=settings, can_use_cuda=True)
    assert answer["error"] == (
        f"card {machine.large.uuid} has 24,576 MiB, less than its devices together "
        "(big 16,384 MiB + little 12,288 MiB): lower their vram_bytes"
    )
    assert len(_discover(program, _parts(machine.large, big=16384, little=8192))) == 2


@pytest.mark.parametrize(("declared_mib", "total_mib", "free_mib"), [(8192, 8192, 8192), (65536, 24576, 24276)])
def test_a_declared_size_is_a_cap(
    machine: FakeMachine, program: Program, declared_mib: int, total_mib: int, free_mib: int
) -> None:
    """A single device with a size has the smaller of that and the card's; so much is free on it at most."""
    (one,) = _discover(program, _parts(machine.large, a=declared_mib))
    assert (one["vram_total_bytes"], one["free"]) == (total_mib * MIB, free_mib * MIB)


def test_a_declared_size_caps_the_cpu_too(program: Program) -> None:
    """Main memory can be held back in the same way; without a size it is all of it."""
    settings = [{"id": "a", "backend": "cpu", "vram_bytes": 64 * MIB}, {"id": "b", "backend": "cpu"}]
    capped, whole = _discover(program, settings)
    assert (capped["vram_total_bytes"], capped["free"]) == (64 * MIB, 64 * MIB)
    assert whole["vram_total_bytes"] > whole["free"] > 64 * MIB


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


@pytest.mark.parametrize("fault", ["lost", "condemned"])
def test_a_card_that_fails_is_a_problem_of_all_its_parts(machine: FakeMachine, program: Program, fault: str) -> None:
    """Off the bus, or after an uncorrectable ECC error: both devices of the card say why, with nothing free; the other
    card has no problem."""
    _discover(program, [*_parts(machine.large, big=14000, little=10000), {"id": "small", "uuid": machine.small.uuid}])
    assert [one["problem"] for one in program.ask("sources", at=1.0)] == [None, None, None]
    if fault == "lost":
        machine.large.code = LOST
    else:
        machine.xids = [(machine.large, 48)]
    machine.apply()
    big, little, small = program.ask("sources", at=2.0)
    expected = {"lost": "GPU is lost", "condemned": "Xid 48: uncorrectable ECC error; the card must be reset"}[fault]
    assert (big["problem"], big["free"], big["process_bytes"]) == (expected, 0, None)
    assert (little["problem"], little["free"]) == (expected, 0)
    assert (small["problem"], small["free"]) == (None, machine.small.free_bytes)


def test_a_driver_that_vanishes_is_a_problem_until_it_is_back(machine: FakeMachine, program: Program) -> None:
    """Every card has the problem while the driver is away, and none once it answers again."""
    _discover(program)
    machine.driver = DRIVER_NOT_LOADED
    machine.apply()
    away = program.ask("sources", at=1.0)
    assert [(one["problem"], one["free"]) for one in away] == [("Driver Not Loaded", 0)] * 2
    machine.driver = OK
    machine.apply()
    back = program.ask("sources", at=10.0)
    assert [(one["problem"], one["free"]) for one in back] == [
        (None, machine.small.free_bytes),
        (None, machine.large.free_bytes),
    ]


def test_a_process_has_its_memory_on_each_card(machine: FakeMachine, program: Program) -> None:
    """A worker split over both cards: each source has its part by process id; of another process it has nothing."""
    machine.processes = [(machine.large, 4242, 200), (machine.small, 4242, 100), (machine.small, 4243, 50)]
    machine.apply()
    _discover(program)
    small, large = program.ask("sources", at=1.0, pid=4242)
    assert (small["process_bytes"], large["process_bytes"]) == (100 * MIB, 200 * MIB)
    small, large = program.ask("sources", at=1.0, pid=4243)
    assert (small["process_bytes"], large["process_bytes"]) == (50 * MIB, None)


@pytest.mark.parametrize("processes_code", [NOT_SUPPORTED, OK])
def test_a_driver_that_does_not_tell_processes(machine: FakeMachine, program: Program, processes_code: int) -> None:
    """An old driver lists none, one that is looked at from a container lists them without memory: unknown, not 0, and
    no problem of the card."""
    machine.processes, machine.processes_code = [(machine.large, 4242, -1)], processes_code
    machine.apply()
    _discover(program)
    large = program.ask("sources", at=1.0, pid=4242)[1]
    assert (large["process_bytes"], large["problem"]) == (None, None)


def test_a_device_without_a_driver_has_used_what_is_not_free() -> None:
    """A simulated device has no utilisation, no processes and no problem; its used memory is the rest of its total."""
    source = sources_for(["3060"])[0]
    source.device.vram_free_bytes = source.device.vram_total_bytes - 5 * MIB
    assert (source.read_used_bytes(), source.read_utilization()) == (5 * MIB, None)
    assert (source.read_problem(), source.read_process_bytes(1)) == (None, None)


def test_the_cpu_has_no_problem_and_no_processes(program: Program) -> None:
    """Nobody reports either of it."""
    (one,) = _discover(program, [{"id": "cpu", "backend": "cpu"}])
    assert (one["problem"], one["process_bytes"], one["uuid"]) == (None, None, None)
