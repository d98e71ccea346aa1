"""A replica's life: the table is the whole truth, and what each step does besides."""

from __future__ import annotations

from itertools import product

import pytest

from llama_orch.contract.models import ReplicaState
from llama_orch.core.replica import (
    BACKOFF_FIRST_S,
    BACKOFF_MAX_S,
    FAILED_LOADS_MAX,
    HOLDS_MEMORY,
    RESTARTS_MAX,
    TRANSITIONS,
    Replica,
    ReplicaEvent,
)

S, E = ReplicaState, ReplicaEvent
ALL_PAIRS = list(product(ReplicaState, ReplicaEvent))


def a_replica(state: ReplicaState = S.UNLOADED, *, is_pinned: bool = False, slots: int = 4) -> Replica:
    return Replica("r", "default", ("3090",), slots, state, {"3090": 100}, is_pinned=is_pinned)


def served(replica: Replica, now: float = 0.0) -> Replica:
    if replica.state is S.UNLOADED:
        replica.mark_loading(now)
    replica.mark_ready(replica.slots, now)
    return replica


# -- the table ---------------------------------------------------------------------------------------------------------


@pytest.mark.spec("HP-PLC-7")
@pytest.mark.parametrize(("state", "event"), [pair for pair in ALL_PAIRS if pair not in TRANSITIONS])
def test_a_step_that_the_table_lacks_is_refused(state: ReplicaState, event: ReplicaEvent) -> None:
    """An illegal step raises and leaves the replica as it was."""
    replica = a_replica(state)
    with pytest.raises(KeyError):
        replica.step(event)
    assert replica.state is state


@pytest.mark.spec("HP-PLC-7")
@pytest.mark.parametrize(("state", "event"), list(TRANSITIONS))
def test_a_step_of_the_table_is_taken(state: ReplicaState, event: ReplicaEvent) -> None:
    """A legal step leads where the table says."""
    replica = a_replica(state)
    replica.step(event)
    assert replica.state is TRANSITIONS[state, event]


def test_only_stopped_is_final() -> None:
    """Every other state has a way on, and every one of them a way to `stopped`."""
    assert {state for state, _ in TRANSITIONS} == set(ReplicaState) - {S.STOPPED}
    assert {state for state, event in TRANSITIONS if event is E.STOP} == set(ReplicaState) - {S.STOPPED}


def test_every_state_can_be_reached_from_the_beginning() -> None:
    """`unloaded` is where a replica begins, and nothing of the table is out of its reach."""
    reached = {S.UNLOADED}
    for _ in ReplicaState:
        reached |= {TRANSITIONS[state, event] for state, event in TRANSITIONS if state in reached}
    assert reached == set(ReplicaState)


@pytest.mark.spec("HP-PLC-4")
def test_memory_is_given_up_only_where_the_worker_is_gone_for_good() -> None:
    """Whatever holds memory gives it up on the way to `unloaded`, `failed` or `stopped`, and nowhere else."""
    for (state, _), after in TRANSITIONS.items():
        if state in HOLDS_MEMORY and after not in HOLDS_MEMORY:
            assert after in (S.UNLOADED, S.FAILED, S.STOPPED)
        if state not in HOLDS_MEMORY and after in HOLDS_MEMORY:
            assert after is S.LOADING


@pytest.mark.spec("HP-PLC-4")
def test_what_waits_for_room_holds_none_yet() -> None:
    """`loading` in name only: the room is promised, and is held once the worker is launched."""
    replica = a_replica()
    replica.mark_loading(1.0, is_launched=False)
    assert (replica.is_promised, replica.holds_memory, replica.promised_since_s) == (True, False, 1.0)
    replica.is_launched = True
    assert (replica.is_promised, replica.holds_memory) == (False, True)


@pytest.mark.spec("HP-PLC-4", "HP-PLC-7")
@pytest.mark.parametrize("state", [S.BACKOFF, S.FAILED, S.STOPPED, S.UNLOADED])
def test_a_lost_worker_holds_what_it_held_until_its_process_is_gone(state: ReplicaState) -> None:
    """Whatever becomes of the replica meanwhile; its size is that of the worker that is still there."""
    replica = a_replica(state)
    replica.sizes = ({"3090": 100}, {"3090": 160})
    replica.resize(2)
    replica.is_lingering = True
    replica.shrink()
    assert (replica.holds_memory, replica.need_bytes) == (True, {"3090": 160})
    assert replica.is_leaving is (state is not S.BACKOFF)
    replica.mark_gone()
    assert replica.holds_memory is (state is S.BACKOFF)
    assert replica.need_bytes == {"3090": 160 if state is S.BACKOFF else 100}


# -- losses ------------------------------------------------------------------------------------------------------------


@pytest.mark.spec("HP-PLC-7")
def test_the_backoff_doubles_up_to_its_limit() -> None:
    """0.5 s, 1 s and so on up to 30 s; the replica that stays loaded is given up after its last restart."""
    replica = a_replica(S.LOADING, is_pinned=True)
    waits = []
    for n in range(RESTARTS_MAX):
        replica.mark_lost("gone", 100.0 * n)
        assert replica.retry_at_s is not None
        waits.append(replica.retry_at_s - 100.0 * n)
        replica.mark_loading(replica.retry_at_s)
    assert waits == [min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2**n) for n in range(RESTARTS_MAX)]
    replica.mark_lost("gone", 1000.0)
    assert (replica.state, replica.retry_at_s, replica.restarts) == (S.FAILED, None, RESTARTS_MAX)


@pytest.mark.spec("HP-PLC-7", "HP-PLC-8")
def test_who_waits_for_a_model_that_cannot_be_loaded_hears_of_it_soon() -> None:
    """Loaded on demand, and never served: given up after two restarts, for the time of its quarantine."""
    replica = a_replica(S.LOADING)
    for _ in range(FAILED_LOADS_MAX):
        replica.mark_lost("bad file", 5.0)
        replica.mark_loading(5.0)
    replica.mark_lost("bad file", 5.0)
    assert (replica.state, replica.failed_at_s) == (S.FAILED, 5.0)
    replica.revive()
    assert (replica.state, replica.losses_in_a_row, replica.last_error) == (S.UNLOADED, 0, None)


@pytest.mark.spec("HP-PLC-7")
def test_a_model_on_demand_that_has_served_is_started_again_as_often_as_any() -> None:
    """Its losses are those of a worker, and not of its file."""
    replica = served(a_replica())
    for _ in range(RESTARTS_MAX):
        replica.mark_lost("gone", 1.0)
        replica.mark_loading(1.0)
    assert replica.state is S.LOADING


@pytest.mark.spec("HP-PLC-7")
def test_a_loss_frees_every_slot() -> None:
    """Nothing of the lost worker is left: no lease, no warm slot, no time since which it serves."""
    replica = served(a_replica())
    replica.take("a", exclusive=True)
    replica.mark_lost("gone", 1.0)
    assert (replica.leases, replica.slot_used_s, replica.ready_since_s) == ({}, {}, None)
    assert not replica.can_take(exclusive=False)


@pytest.mark.spec("HP-PLC-7")
@pytest.mark.parametrize("state", [S.LOADING, S.READY])
def test_a_lack_of_memory_is_known_at_the_load_or_later(state: ReplicaState) -> None:
    """Whether it loads or serves, a replica that runs short goes back to where it can be planned anew."""
    replica = a_replica(S.LOADING)
    if state is S.READY:
        served(replica)
        replica.is_closing = True
    replica.mark_short("out of memory")
    assert (replica.state, replica.shortages, replica.is_closing) == (S.UNLOADED, 1, False)


@pytest.mark.spec("HP-PLC-4")
def test_a_need_that_was_too_little_grows_once_the_process_is_gone() -> None:
    """Until then the process has what it had, and more than that is not held."""
    replica = a_replica(S.LOADING)
    replica.is_lingering = True
    replica.mark_short("out of memory")
    replica.need_more(1.5)
    assert (replica.holds_memory, replica.need_bytes) == (True, {"3090": 100})
    replica.mark_gone()
    assert (replica.holds_memory, replica.need_bytes) == (False, {"3090": 150})
    replica.give_up(1.0)
    replica.revive()
    assert replica.need_bytes == {"3090": 100}


def test_after_a_quarantine_the_need_is_the_predicted_one_again() -> None:
    """What made it run short may have been another program: without this it would be too large for ever."""
    replica = a_replica(S.LOADING)
    for _ in range(2):
        replica.mark_short("out of memory")
        replica.need_more(2.0)
        replica.mark_loading(1.0)
    assert replica.need_bytes == {"3090": 400}
    replica.mark_short("out of memory")
    replica.give_up(1.0)
    replica.revive()
    assert replica.need_bytes == {"3090": 100}


def test_after_a_load_the_need_is_the_measured_one() -> None:
    """A quarantine later does not bring back a prediction that was proven wrong."""
    replica = a_replica(S.LOADING)
    replica.mark_short("out of memory")
    replica.need_more(2.0)
    replica.mark_loading(1.0)
    replica.measured({"3090": 150})
    served(replica)
    replica.give_up(1.0)
    replica.revive()
    assert replica.need_bytes == {"3090": 150}


def test_what_a_load_was_seen_to_take_says_nothing_of_other_sizes() -> None:
    """A replica with several sizes is planned by its sizes again once it is unloaded."""
    replica = a_replica()
    replica.sizes = ({"3090": 100}, {"3090": 160})
    replica.resize(2)
    replica.mark_loading(1.0)
    replica.measured({"3090": 150})
    assert replica.need_bytes == {"3090": 150}
    replica.mark_unloading()
    replica.mark_unloaded()
    assert (replica.slots, replica.need_bytes) == (1, {"3090": 100})


@pytest.mark.spec("HP-PLC-5")
def test_a_shortage_raises_the_need_of_every_size() -> None:
    """Until the quarantine is over."""
    replica = a_replica(slots=1)
    replica.sizes = ({"3090": 100}, {"3090": 150})
    replica.need_more(1.5)
    assert replica.need_bytes == {"3090": 150}
    replica.resize(2)
    assert (replica.slots, replica.need_bytes) == (2, {"3090": 225})
    replica.give_up(1.0)
    replica.revive()
    assert (replica.slots, replica.need_bytes) == (1, {"3090": 100})


def test_a_replica_that_was_to_leave_and_died_is_not_told_to_leave_later() -> None:
    """Given up and revived, it would otherwise be unloaded whenever it is loaded."""
    replica = served(a_replica())
    replica.is_closing, replica.close_reason = True, "evicted"
    replica.give_up(1.0)
    assert not replica.is_leaving
    replica.revive()
    assert not replica.is_closing


def test_what_loses_its_place_keeps_the_count_of_its_losses() -> None:
    """Planned anew elsewhere, a model that always dies is still given up in the end."""
    replica = a_replica(S.LOADING)
    replica.mark_lost("gone", 1.0)
    replica.mark_homeless()
    assert (replica.state, replica.losses_in_a_row, replica.retry_at_s) == (S.UNLOADED, 1, None)


def test_an_unload_starts_everything_anew() -> None:
    """Losses, restarts in a row and the reason to leave belong to the life that is over."""
    replica = served(a_replica())
    replica.mark_lost("gone", 1.0)
    replica.mark_loading(2.0)
    replica.is_closing, replica.close_reason = True, "idle"
    replica.mark_unloading()
    assert replica.is_leaving
    replica.mark_unloaded()
    assert (replica.state, replica.losses_in_a_row, replica.has_served) == (S.UNLOADED, 0, False)
    assert (replica.is_closing, replica.close_reason) == (False, "")


# -- slots -------------------------------------------------------------------------------------------------------------


@pytest.mark.spec("HP-SES-3")
def test_a_free_slot_is_the_one_that_was_asked_for_or_the_one_unused_longest() -> None:
    """So that what others hold of a session's KV stays as long as it can."""
    replica = served(a_replica(slots=3))
    leases = [replica.take(f"t{n}", exclusive=False) for n in range(3)]
    for lease, n in zip(leases, (1, 0, 2), strict=True):
        replica.release(lease, f"t{leases.index(lease)}", now=1.0 + n, keeps_kv=True)
    assert replica.take("again", exclusive=False, slot=2).slots == (2,)
    assert replica.take("any", exclusive=False).slots == (1,)
    assert replica.take("taken", exclusive=False, slot=2).slots == (0,)


@pytest.mark.spec("HP-SES-3")
def test_a_slot_that_holds_nothing_of_worth_is_taken_first() -> None:
    """Tasks without a session come and go on it, and an exclusive one overwrites only the slot that it decodes on."""
    replica = served(a_replica(slots=3))
    for slot, n in ((0, 1), (1, 2)):
        replica.release(replica.take("kept", exclusive=False, slot=slot), "kept", now=1.0 + n, keeps_kv=True)
    for number in range(3):
        lease = replica.take(f"t{number}", exclusive=number == 1)
        assert lease.slots[0] == 2
        replica.release(lease, f"t{number}", now=5.0 + number)
    lease = replica.take("warm", exclusive=True, slot=1)
    assert lease.slots == (1, 2, 0)
    replica.release(lease, "warm", now=9.0, keeps_kv=True)
    assert replica.take("last", exclusive=False, slot=9).slots == (2,)
    assert replica.take("then", exclusive=False).slots == (0,)


@pytest.mark.spec("HP-DET-1")
def test_an_exclusive_task_takes_all_slots() -> None:
    """And gives them all back."""
    replica = served(a_replica(slots=3))
    lease = replica.take("strict", exclusive=True)
    assert (lease.slots, replica.can_take(exclusive=False)) == ((0, 1, 2), False)
    replica.release(lease, "strict", 2.0)
    assert replica.can_take(exclusive=True)


def test_a_release_that_comes_late_takes_nobodys_slot() -> None:
    """After a loss the slot may have another holder."""
    replica = served(a_replica(slots=1))
    lease = replica.take("old", exclusive=False)
    replica.mark_lost("gone", 1.0)
    replica.mark_loading(2.0)
    served(replica, 3.0)
    replica.take("new", exclusive=False)
    replica.release(lease, "old", 4.0)
    assert replica.leases == {0: "new"}


def test_a_closing_replica_takes_nothing() -> None:
    """It finishes what it has."""
    replica = served(a_replica())
    replica.is_closing = True
    assert not replica.can_take(exclusive=False)
    assert not replica.is_coming
