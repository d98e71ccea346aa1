"""The table of a replica's life is the whole truth: what it lacks cannot happen."""

from __future__ import annotations

from itertools import product

import pytest

from llama_orch.contract.models import ReplicaState
from llama_orch.core.replica import TRANSITIONS, Replica, ReplicaEvent

ALL_PAIRS = list(product(ReplicaState, ReplicaEvent))


def replica_in(state: ReplicaState) -> Replica:
    return Replica("r", "p", ("3090",), 4, state, {"3090": 7})


@pytest.mark.spec("HP-PLC-7")
@pytest.mark.parametrize(("state", "event"), [pair for pair in ALL_PAIRS if pair not in TRANSITIONS])
def test_a_step_that_the_table_lacks_is_refused(state: ReplicaState, event: ReplicaEvent) -> None:
    """An illegal step raises and leaves the replica as it was."""
    replica = replica_in(state)
    with pytest.raises(KeyError):
        replica.step(event)
    assert replica.state is state


@pytest.mark.spec("HP-PLC-7")
def test_stopped_is_final_and_everything_leads_there() -> None:
    """Nothing leaves `stopped`, and every other state can be ended."""
    assert not any(state is ReplicaState.STOPPED for state, _ in TRANSITIONS)
    assert {state for state, event in TRANSITIONS if event is ReplicaEvent.STOP} == set(ReplicaState) - {
        ReplicaState.STOPPED
    }


@pytest.mark.spec("HP-PLC-4", "HP-PLC-7")
def test_memory_is_held_from_the_launch_until_it_was_seen_to_return() -> None:
    """Also in backoff, for the next try, and as long as a lost worker's process is not gone."""
    held = {state for state in ReplicaState if replica_in(state).holds_memory}
    assert held == {ReplicaState.LOADING, ReplicaState.READY, ReplicaState.UNLOADING, ReplicaState.BACKOFF}
    promised, lingering = replica_in(ReplicaState.LOADING), replica_in(ReplicaState.FAILED)
    promised.is_launched, lingering.is_lingering = False, True
    assert (promised.holds_memory, lingering.holds_memory) == (False, True)


@pytest.mark.spec("HP-PLC-4")
def test_slots_are_taken_by_the_longest_unused_first_or_as_asked() -> None:
    """What a session left in a slot stays as long as it can, and is found again if its slot is free."""
    replica = replica_in(ReplicaState.READY)
    for number, slot in enumerate((2, 0, 1)):
        replica.release(replica.take(f"t{number}", exclusive=False, slot=slot), f"t{number}", float(number))
    assert replica.take("a", exclusive=False).slots == (3,)  # never used
    assert replica.take("b", exclusive=False).slots == (2,)
    assert replica.take("c", exclusive=False, slot=1).slots == (1,)
    assert replica.take("d", exclusive=False, slot=1).slots == (0,)


@pytest.mark.spec("HP-PLC-5")
def test_what_was_too_little_is_more_the_next_time() -> None:
    """A shortage raises the need of every size, until the quarantine is over."""
    replica = Replica("r", "p", ("c",), 1, ReplicaState.UNLOADED, {"c": 100}, sizes=({"c": 100}, {"c": 150}))
    replica.need_more(1.5)
    assert replica.need_bytes == {"c": 150}
    replica.resize(2)
    assert (replica.slots, replica.need_bytes) == (2, {"c": 225})
    replica.step(ReplicaEvent.GIVE_UP)
    replica.revive()
    assert (replica.slots, replica.need_bytes) == (1, {"c": 100})
