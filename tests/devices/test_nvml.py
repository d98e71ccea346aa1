"""Cards through the real pynvml and a fake driver's library: what is read, and that no fault gets out."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.live.client import until

from .machine import (
    DRIVER_NOT_LOADED,
    LOST,
    MIB,
    NEEDS_RESET,
    NOT_SUPPORTED,
    OK,
    UNKNOWN,
    FakeMachine,
    Program,
    a_program,
)


@pytest.mark.spec("HP-PLC-6")
def test_cards_are_known_by_uuid(machine: FakeMachine, program: Program) -> None:
    """Both cards with UUID, name and memory; the index is NVML's own, whose first card is not CUDA's."""
    assert program.ask("cards") == [
        {"uuid": card.uuid, "name": card.name, "index": index, "vram_total_bytes": card.total_mib * MIB}
        for index, card in enumerate((machine.small, machine.large))
    ]


def test_a_reading_has_memory_utilization_and_processes(machine: FakeMachine, program: Program) -> None:
    """One pass reads every card: total, free, used, utilisation as a fraction, memory by process."""
    machine.processes = [(machine.large, 4242, 200), (machine.large, 4243, 50)]
    machine.apply()
    readings = program.read()
    assert readings.keys() == {machine.small.uuid, machine.large.uuid}
    assert readings[machine.large.uuid] == {
        "uuid": machine.large.uuid,
        "vram_total_bytes": 24576 * MIB,
        "vram_free_bytes": 24276 * MIB,
        "vram_used_bytes": 300 * MIB,
        "utilization": 0.37,
        "process_bytes": {"4242": 200 * MIB, "4243": 50 * MIB},
        "error": None,
        "is_lost": False,
    }
    assert readings[machine.small.uuid]["process_bytes"] == {}


def test_memory_that_another_program_takes_is_not_free(machine: FakeMachine, program: Program) -> None:
    """A program that is none of ours takes 9 GiB of the small card: the next reading has that much less free."""
    before = program.read()[machine.small.uuid]
    machine.small.used_mib += 9216
    machine.processes = [(machine.small, 777, 9216)]
    machine.apply()
    after = program.read()[machine.small.uuid]
    assert before["vram_free_bytes"] - after["vram_free_bytes"] == 9216 * MIB
    assert after["process_bytes"] == {"777": 9216 * MIB}


@pytest.mark.parametrize("processes_code", [NOT_SUPPORTED, OK])
def test_what_the_driver_does_not_tell_is_none(machine: FakeMachine, program: Program, processes_code: int) -> None:
    """No list of processes, a list without their memory, no utilisation: unknown, and the memory is still read."""
    machine.processes = [(machine.large, 4242, -1)]
    machine.processes_code = processes_code
    machine.large.utilization = -1
    machine.apply()
    reading = program.read()[machine.large.uuid]
    assert (reading["process_bytes"], reading["utilization"], reading["error"]) == (None, None, None)
    assert reading["vram_free_bytes"] == machine.large.free_bytes


@pytest.mark.parametrize(
    ("code", "error", "is_lost"),
    [(LOST, "GPU is lost", True), (NEEDS_RESET, "GPU requires restart", True), (UNKNOWN, "Unknown Error", False)],
)
def test_a_card_that_fails_has_nothing_free(
    machine: FakeMachine, program: Program, code: int, error: str, is_lost: bool
) -> None:
    """A card that is lost, waits for a reset after an ECC error or just fails says so; the other card goes on."""
    program.read()
    machine.large.code = code
    machine.apply()
    readings = program.read()
    failed = readings[machine.large.uuid]
    assert (failed["error"], failed["is_lost"]) == (error, is_lost)
    assert (failed["vram_free_bytes"], failed["vram_used_bytes"], failed["utilization"]) == (0, None, None)
    assert failed["vram_total_bytes"] == machine.large.total_mib * MIB
    assert readings[machine.small.uuid]["vram_free_bytes"] == machine.small.free_bytes
    assert program.read() == readings
    assert program.warnings() == [f"card {machine.large.uuid} cannot be used: {error}"]


def test_a_lost_card_that_came_back_is_found_again(machine: FakeMachine, program: Program) -> None:
    """The library forgets a lost card only when it is opened anew, which is tried after a second."""
    machine.large.code = LOST
    machine.apply()
    assert program.read(at=10.0)[machine.large.uuid]["is_lost"]
    machine.large.code = OK
    machine.apply()
    assert program.read(at=10.9)[machine.large.uuid]["is_lost"]
    readings = program.read(at=11.0)
    assert [reading["error"] for reading in readings.values()] == [None, None]
    assert readings[machine.large.uuid]["vram_free_bytes"] == machine.large.free_bytes


def test_both_cards_lost(machine: FakeMachine, program: Program) -> None:
    """Nothing is free anywhere, nothing is raised, also after the library was opened anew without any card."""
    machine.small.code = machine.large.code = LOST
    machine.apply()
    for at in (0.0, 1.0, 2.0, 3.0):
        readings = program.read(at=at)
        assert all(reading["is_lost"] and reading["vram_free_bytes"] == 0 for reading in readings.values())
    assert len(readings) == 2


@pytest.mark.parametrize("xid", [48, 79])
def test_a_fatal_xid_condemns_its_card(machine: FakeMachine, program: Program, xid: int) -> None:
    """After an ECC error or a fall off the bus the card counts as lost though the driver still reads it."""
    machine.xids = [(machine.large, xid)]
    machine.apply()
    for at in (0.0, 100.0):
        readings = program.read(at=at)
        condemned = readings[machine.large.uuid]
        assert condemned["error"].startswith(f"Xid {xid}: ")
        assert (condemned["is_lost"], condemned["vram_free_bytes"]) == (True, 0)
        assert readings[machine.small.uuid]["error"] is None


def test_a_card_that_was_reset_is_pardoned(machine: FakeMachine, program: Program) -> None:
    """Lost after its Xid and found again, the card serves again."""
    machine.xids = [(machine.large, 79)]
    machine.large.code = LOST
    machine.apply()
    assert program.read(at=0.0)[machine.large.uuid]["error"] == "GPU is lost"
    machine.large.code = OK
    machine.apply()
    assert program.read(at=1.0)[machine.large.uuid]["error"] is None


def test_a_programs_fault_condemns_no_card(machine: FakeMachine, program: Program) -> None:
    """Xid 31 is a bad access by some program: it is logged, and the card goes on."""
    machine.xids = [(machine.large, 31)]
    machine.apply()
    assert program.read()[machine.large.uuid]["error"] is None
    assert any("Xid 31" in text for text in program.warnings())


def test_a_driver_that_vanishes_and_comes_back(machine: FakeMachine, program: Program) -> None:
    """While it is away nothing is free on any card; it is tried again after 1 s, then after 2 s more, and is back."""
    program.read(at=0.0)
    machine.driver = DRIVER_NOT_LOADED
    machine.apply()
    for at in (0.0, 1.0):
        readings = program.read(at=at)
        assert [(one["error"], one["vram_free_bytes"]) for one in readings.values()] == [("Driver Not Loaded", 0)] * 2
    machine.driver = OK
    machine.apply()
    assert program.read(at=2.9)[machine.small.uuid]["error"] == "Driver Not Loaded"
    assert [reading["error"] for reading in program.read(at=3.0).values()] == [None, None]
    assert len(program.warnings()) == 2


def test_a_driver_that_vanishes_between_two_cards(machine: FakeMachine, program: Program) -> None:
    """A pass that read the first card and finds no driver at the second one trusts neither."""
    machine.large.code = DRIVER_NOT_LOADED
    machine.apply()
    assert [reading["vram_free_bytes"] for reading in program.read(at=0.0).values()] == [0, 0]
    machine.large.code = OK
    machine.apply()
    assert [reading["error"] for reading in program.read(at=1.0).values()] == [None, None]


def test_a_driver_that_stays_away_is_tried_once_a_minute(machine: FakeMachine, program: Program) -> None:
    """The wait between tries doubles up to 60 s and no further."""
    machine.driver = DRIVER_NOT_LOADED
    machine.apply()
    for at in (0, 1, 3, 7, 15, 31, 63, 123):
        assert program.read(at=at)[machine.large.uuid]["error"] == "Driver Not Loaded"
    machine.driver = OK
    machine.apply()
    assert program.read(at=182.9)[machine.large.uuid]["error"] == "Driver Not Loaded"
    assert program.read(at=183)[machine.large.uuid]["error"] is None


def test_no_driver_is_no_error(machine: FakeMachine) -> None:
    """With the driver not loaded there are no cards, no readings and no warning."""
    machine.driver = DRIVER_NOT_LOADED
    machine.apply()
    with a_program(machine) as program:
        assert program.ask("cards") == []
        assert program.read() == {}
        assert program.warnings() == []


def test_no_library_is_no_error(tmp_path: Path) -> None:
    """Where the driver's library is no library there are no cards, no readings and no warning."""
    (tmp_path / "libnvidia-ml.so.1").touch()
    with a_program(FakeMachine(tmp_path, tmp_path / "machine")) as program:
        assert program.ask("cards") == []
        assert program.read() == {}
        assert program.warnings() == []


def test_a_card_lost_at_the_start_is_left_out(machine: FakeMachine) -> None:
    """The service starts with the card that can be read, and says which one cannot."""
    machine.large.code = NEEDS_RESET
    machine.apply()
    with a_program(machine) as program:
        assert [card["uuid"] for card in program.ask("cards")] == [machine.small.uuid]
        assert program.warnings() == ["card 1 is left out: GPU requires restart"]


def test_a_watch_reads_no_more_often_than_needed(machine: FakeMachine, program: Program) -> None:
    """Within a reading's age it is given again; past it the driver is asked."""
    age = {"max_age_s": 0.1, "deadline_s": 30.0}
    first, _ = program.ask("watch", at=0.0, **age)
    machine.small.used_mib += 1000
    machine.apply()
    assert program.ask("watch", at=0.05, **age)[0] == first
    later, _ = program.ask("watch", at=0.2, **age)
    assert later[machine.small.uuid]["vram_free_bytes"] == machine.small.free_bytes


def test_a_driver_that_hangs_costs_one_deadline(machine: FakeMachine, program: Program) -> None:
    """The first caller waits for the deadline, the next ones not at all; all cards count as full until it answers."""
    limits = {"max_age_s": 0.1, "deadline_s": 0.5}
    machine.large.hangs = True
    machine.apply()
    first, first_took_s = program.ask("watch", at=0.0, **limits)
    second, second_took_s = program.ask("watch", at=1.0, **limits)
    assert first_took_s >= 0.5 > second_took_s
    assert first == second
    for reading in first.values():
        assert (reading["error"], reading["vram_free_bytes"]) == ("the driver has not answered for 0.5 s", 0)
    machine.large.hangs = False
    machine.apply()
    until(lambda: program.ask("watch", at=2.0, **limits)[0][machine.large.uuid]["error"] is None)
    assert any("does not answer" in text for text in program.warnings())
