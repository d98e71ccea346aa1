"""The ledger: what is free is what neither a replica nor another program has, as far as anybody can know."""

from __future__ import annotations

from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_orch.contract.models import ReplicaState
from llama_orch.core.ledger import RESERVE_BYTES, Device, Ledger
from llama_orch.core.replica import Replica
from llama_orch.testing.builders import GIB, a_device

S = ReplicaState
NUMBERS = count()


def a_replica(need_gib: float, state: ReplicaState = S.READY, devices: str = "3090", **fields: object) -> Replica:
    ids = tuple(devices.split("+"))
    need = dict.fromkeys(ids, int(need_gib * GIB / len(ids)))
    replica = Replica(f"r{next(NUMBERS)}", "default", ids, 4, state, need, is_pinned=False)
    for name, value in fields.items():
        setattr(replica, name, value)
    return replica


def promised(need_gib: float, since_s: float = 0.0) -> Replica:
    return a_replica(need_gib, S.LOADING, is_launched=False, promised_since_s=since_s)


def a_ledger(*replicas: Replica, cards: tuple[str, ...] = ("3090", "3060")) -> Ledger:
    return Ledger([a_device(card) for card in cards], {replica.replica_id: replica for replica in replicas})


def free_gib(ledger: Ledger, device_id: str = "3090", *, besides: Replica | None = None) -> float:
    return (ledger.free_bytes(device_id, besides=besides) + RESERVE_BYTES) / GIB


def see(ledger: Ledger, free_gib: float, device_id: str = "3090", problem: str | None = None) -> Device:
    ledger.seen(device_id, int(free_gib * GIB), problem, is_lost=False)
    return ledger.devices[device_id]


@pytest.mark.spec("HP-PLC-4")
@pytest.mark.parametrize("state", list(ReplicaState))
def test_memory_is_held_from_the_load_to_the_end_of_the_unload(state: ReplicaState) -> None:
    """While a worker is there, comes, goes, or is about to come again."""
    holds = state in (S.LOADING, S.READY, S.UNLOADING, S.BACKOFF)
    ledger = a_ledger(a_replica(10, state))
    assert ledger.held_bytes("3090") == (10 * GIB if holds else 0)
    assert free_gib(ledger) == (14 if holds else 24)


@pytest.mark.spec("HP-PLC-6")
def test_a_split_replica_holds_its_part_of_each_card() -> None:
    """Half and half, and nothing of any other card."""
    ledger = a_ledger(a_replica(10, devices="3090+3060"), cards=("3090", "3060", "4090"))
    assert [free_gib(ledger, card) for card in ("3090", "3060", "4090")] == [19, 7, 24]


@pytest.mark.spec("HP-PLC-4")
def test_what_others_use_is_what_is_missing_beyond_the_loaded_ones() -> None:
    """The driver counts both together."""
    ledger = a_ledger(a_replica(10))
    assert see(ledger, 9).external_bytes == 5 * GIB
    assert free_gib(ledger) == 9
    assert see(ledger, 14).external_bytes == 0


@pytest.mark.spec("HP-PLC-4")
def test_a_replica_that_takes_less_than_was_thought_is_counted_in_full() -> None:
    """Free is the lesser of what the driver and what the ledger count."""
    ledger = a_ledger(a_replica(10))
    see(ledger, 20)
    assert free_gib(ledger) == 14


@pytest.mark.spec("HP-PLC-4")
def test_a_load_that_is_half_done_is_not_taken_for_another_program() -> None:
    """Its memory is held in full already; counted once more it would keep others out."""
    ledger = a_ledger(a_replica(10, S.LOADING))
    see(ledger, 19)
    assert free_gib(ledger) == 14


@pytest.mark.spec("HP-PLC-4")
def test_what_others_use_is_not_forgotten_while_an_unload_is_under_way() -> None:
    """The memory of the leaving one may be back before its end is known: it must not be taken for theirs, or it would
    be given away twice."""
    leaving = a_replica(10)
    ledger = a_ledger(leaving)
    see(ledger, 4)
    leaving.mark_unloading()
    assert see(ledger, 14).external_bytes == 10 * GIB
    leaving.mark_unloaded()
    assert free_gib(ledger) == 14


@pytest.mark.spec("HP-PLC-4")
def test_another_program_that_takes_more_than_a_load_can_is_seen_at_once() -> None:
    """Of what is used while a replica loads, only what the replica cannot be is known to be others'."""
    ledger = a_ledger(a_replica(10, S.LOADING))
    assert see(ledger, 24 - 10 - 3).external_bytes == 3 * GIB
    assert see(ledger, 24 - 1).external_bytes == 1 * GIB


def test_a_card_that_cannot_be_read_keeps_its_last_figure() -> None:
    """And nothing has room on it."""
    ledger = a_ledger()
    see(ledger, 20)
    see(ledger, 0, problem="not answering")
    assert free_gib(ledger) == 20
    assert not ledger.has_room(a_replica(1, S.UNLOADED))
    see(ledger, 20)
    assert ledger.has_room(a_replica(1, S.UNLOADED))


@pytest.mark.spec("HP-PLC-5")
def test_a_reserve_is_never_given_away() -> None:
    """An empty card has room for its capacity, and not for one byte more."""
    ledger = a_ledger()
    replica = a_replica(0, S.UNLOADED)
    replica.need_bytes = {"3090": ledger.capacity_bytes("3090")}
    assert ledger.has_room(replica)
    replica.need_bytes = {"3090": ledger.capacity_bytes("3090") + 1}
    assert not ledger.has_room(replica)


@pytest.mark.spec("HP-PLC-4")
def test_promised_room_is_not_given_to_anybody_else() -> None:
    """It counts for all but the one that it was promised to."""
    one = promised(10)
    ledger = a_ledger(one)
    assert (free_gib(ledger), free_gib(ledger, besides=one)) == (14, 24)
    assert not ledger.has_room(a_replica(14, S.UNLOADED))
    assert ledger.has_room(one)


@pytest.mark.spec("HP-PLC-4")
def test_of_two_promises_the_earlier_one_comes_first() -> None:
    """Counted against each other, neither would ever be kept where there is room for one only."""
    first, second = promised(14, since_s=1.0), promised(14, since_s=2.0)
    ledger = a_ledger(second, first)
    assert (ledger.has_room(first), ledger.has_room(second)) == (True, False)


def test_what_leaves_is_lacking_nowhere_and_is_not_room_yet() -> None:
    """Who needs it has to wait, and nobody else has to leave."""
    newcomer = a_replica(20, S.UNLOADED)
    ledger = a_ledger(a_replica(10, S.UNLOADING), newcomer)
    assert (ledger.lacking_bytes(newcomer), ledger.has_room(newcomer)) == ({}, False)


def test_room_is_not_kept_for_a_promise_that_those_who_leave_make_up_for() -> None:
    """The leaving one's memory is for the promise; what is free besides can be used at once."""
    newcomer = a_replica(3, S.UNLOADED)
    ledger = a_ledger(a_replica(20, S.READY, is_closing=True), promised(20), newcomer)
    assert ledger.has_room(newcomer)
    newcomer.need_bytes = {"3090": 4 * GIB}
    assert ledger.lacking_bytes(newcomer) == {"3090": RESERVE_BYTES}


@pytest.mark.spec("HP-PLC-4", "HP-PLC-7")
def test_a_restart_needs_the_memory_that_was_kept_for_it() -> None:
    """Another program may have taken it; then the restart would fail for want of memory."""
    waits = a_replica(10, S.BACKOFF)
    ledger = a_ledger(waits)
    assert ledger.can_restart(waits)
    ledger.devices["3090"].external_bytes = 15 * GIB
    assert not ledger.can_restart(waits)


@pytest.mark.spec("HP-PLC-7")
def test_two_that_wait_for_their_restart_do_not_keep_each_other_out() -> None:
    """Where another program left room for one of them, the first one takes it."""
    one, other = a_replica(11, S.BACKOFF), a_replica(11, S.BACKOFF)
    ledger = a_ledger(one, other)
    ledger.devices["3090"].external_bytes = 8 * GIB
    assert (ledger.can_restart(one), ledger.can_restart(other)) == (True, True)
    one.mark_loading(1.0)
    assert not ledger.can_restart(other)


@pytest.mark.spec("HP-PLC-4", "HP-PLC-7")
def test_a_restart_does_not_count_on_what_another_lost_process_still_has() -> None:
    """Its own is waited for, whoever starts it; another one's would not be."""
    one, other = a_replica(11, S.BACKOFF, is_lingering=True), a_replica(11, S.BACKOFF)
    ledger = a_ledger(one, other)
    ledger.devices["3090"].external_bytes = 8 * GIB
    assert (ledger.can_restart(one), ledger.can_restart(other)) == (True, False)
    one.mark_gone()
    assert ledger.can_restart(other)


IN_BETWEEN = [S.LOADING, S.UNLOADING, S.BACKOFF]
WORKERS = st.tuples(st.sampled_from([S.READY, *IN_BETWEEN]), st.integers(1, 4), st.floats(0, 1))


@pytest.mark.spec("HP-PLC-4")
@settings(max_examples=300, derandomize=True, deadline=None, database=None)
@given(workers=st.lists(WORKERS, max_size=4), others_gib=st.integers(0, 8))
def test_what_others_use_is_never_mistaken_once_it_was_known(
    workers: list[tuple[ReplicaState, int, float]], others_gib: int
) -> None:
    """Whatever part of their memory those who come and go have in use, a figure that was true stays as it is."""
    ledger = a_ledger(*[a_replica(need, state) for state, need, _ in workers])
    device = ledger.devices["3090"]
    device.external_bytes = others_gib * GIB
    used = sum(need * (1.0 if state is S.READY else share) for state, need, share in workers)
    see(ledger, 24 - others_gib - used)
    assert device.external_bytes == pytest.approx(others_gib * GIB, abs=16)
