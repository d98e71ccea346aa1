"""A session goes back to the slot that holds its KV, as long as it is there (HP-SES-3)."""

from __future__ import annotations

import pytest

from llama_orch.contract.models import Determinism, KvHint, ReplicaState
from llama_orch.core.affinity import GAP_SLOTS, Affinity
from llama_orch.core.replica import Lease, Replica
from llama_orch.core.scheduler import Scheduler
from llama_orch.testing.builders import DIGEST, GIB, a_host, a_scheduler, an_outcome, submit

pytestmark = pytest.mark.spec("HP-SES-3")
SHARED = Determinism.BEST_EFFORT


def a_replica(replica_id: str = "r", since_s: float = 1.0) -> Replica:
    replica = Replica(replica_id, "default", ("3090",), 4, ReplicaState.READY)
    replica.ready_since_s = since_s
    return replica


def turn(scheduler: Scheduler, session_id: str, number: int, now: float) -> Lease | None:
    """One task of the session from start to end: where it ran."""
    task = submit(scheduler, f"{session_id}-{number}", now=now, session_id=session_id, determinism=SHARED).task
    lease = task.lease
    scheduler.finished(task.task_id, an_outcome(), now + 0.5)
    return lease


# -- the memory --------------------------------------------------------------------------------------------------------


def test_a_slot_is_warm_for_the_session_that_ran_there_last() -> None:
    """On that replica and no other, for that session and no other."""
    affinity, replica = Affinity(), a_replica()
    affinity.remember("s", replica, 2, 30)
    assert affinity.slot_on("s", replica) == 2
    assert affinity.slot_on("other", replica) is None
    assert affinity.slot_on(None, replica) is None
    assert affinity.slot_on("s", a_replica("elsewhere")) is None


def test_the_next_worker_of_a_replica_holds_nothing() -> None:
    """It was loaded anew; a replica without a worker remembers nothing either."""
    affinity, replica = Affinity(), a_replica()
    affinity.remember("s", replica, 2, 30)
    replica.ready_since_s = 5.0
    assert affinity.slot_on("s", replica) is None
    replica.ready_since_s = None
    affinity.remember("t", replica, 1, 30)
    assert affinity.slot_on("t", replica) is None


def test_a_slot_that_somebody_uses_is_not_offered() -> None:
    """Its holder ends sooner or later; whether the KV outlives that, the engine says."""
    affinity, replica = Affinity(), a_replica()
    affinity.remember("s", replica, 2, 30)
    replica.leases[2] = "somebody"
    assert affinity.slot_on("s", replica) is None


def test_who_is_overwritten_is_forgotten() -> None:
    """A task of another session, or of none, takes the slot; one of the session itself leaves it warm."""
    affinity, replica = Affinity(), a_replica()
    affinity.remember("s", replica, 2, 30)
    affinity.taken("s", replica, 2)
    assert (affinity.slot_on("s", replica), affinity.holds(replica, 2), affinity.tokens_on(replica)) == (2, True, 30)
    affinity.taken("other", replica, 2)
    assert (affinity.slot_on("s", replica), affinity.holds(replica, 2), affinity.tokens_on(replica)) == (None, False, 0)
    affinity.remember("s", replica, 1, 30)
    affinity.remember("t", replica, 1, 40)
    assert (affinity.slot_on("s", replica), affinity.slot_on("t", replica)) == (None, 1)
    affinity.remember("t", replica, 3, 50)
    assert (affinity.holds(replica, 1), affinity.tokens_on(replica)) == (False, 50)


# -- in the scheduler --------------------------------------------------------------------------------------------------


def test_a_session_returns_to_its_slot() -> None:
    """Though others were let go earlier, and though another session came between."""
    scheduler = a_scheduler()
    first = turn(scheduler, "a", 1, 1.0)
    second = turn(scheduler, "b", 1, 2.0)
    assert first is not None
    assert second is not None
    assert first.slots != second.slots
    assert turn(scheduler, "a", 2, 3.0) == first
    assert turn(scheduler, "b", 2, 4.0) == second


@pytest.mark.parametrize(("busier", "stays"), [(0, True), (GAP_SLOTS, True), (GAP_SLOTS + 1, False)])
def test_a_session_stays_on_its_card_while_it_is_not_much_busier(busier: int, stays: bool) -> None:
    """Up to two more busy slots than elsewhere, though another card has more memory free; beyond that its KV costs more
    than it saves, it starts cold, and belongs there from then on."""
    scheduler = a_scheduler(a_host("3090+3060"))
    first = submit(scheduler, "first", session_id="s", determinism=SHARED).task
    assert first.lease == Lease("default-0", (0,))
    scheduler.finished("first", an_outcome(), 0.5)
    scheduler.devices["3090"].external_bytes = 20 * GIB
    scheduler.replicas["default-0"].leases.update({3 - n: "busy" for n in range(busier)})
    second = submit(scheduler, "second", now=1.0, session_id="s", determinism=SHARED).task
    assert second.placement is not None
    assert second.placement.endswith("slot 0 holds its session)") is stays
    assert second.replica_id == ("default-0" if stays else "default-1")
    scheduler.finished("second", an_outcome(), 1.5)
    third = submit(scheduler, "third", now=2.0, session_id="s", determinism=SHARED).task
    assert third.replica_id == second.replica_id


@pytest.mark.spec("HP-DET-1")
@pytest.mark.parametrize("determinism", Determinism)
def test_strict_turns_return_to_their_slot_too(determinism: Determinism) -> None:
    """They take over what leaves their bytes as they are; the engine sees to that."""
    scheduler = a_scheduler()
    lease = turn(scheduler, "s", 1, 1.0)
    turn(scheduler, "t", 1, 2.0)
    task = submit(scheduler, "next", now=3.0, session_id="s", determinism=determinism).task
    assert lease is not None
    assert task.lease is not None
    assert task.lease.slots[0] == lease.slots[0]
    assert task.placement is not None
    assert "holds its session" in task.placement


def test_a_cold_task_looks_for_no_warmth() -> None:
    """`kv_hint: cold`: it goes where there is most room, and what the session had is still there for the next one."""
    scheduler = a_scheduler()
    lease = turn(scheduler, "s", 1, 1.0)
    cold = submit(scheduler, "cold", now=3.0, session_id="s", determinism=SHARED, kv_hint=KvHint.COLD).task
    assert cold.placement is not None
    assert "holds its session" not in cold.placement
    assert cold.lease != lease


def test_a_lost_worker_takes_the_sessions_with_it() -> None:
    """The next turn is placed as if there had been none."""
    scheduler = a_scheduler()
    for n in range(3):
        turn(scheduler, f"s{n}", 1, 1.0 + n)
    scheduler.replica_lost("default-0", "gone", 5.0)
    scheduler.tick(6.0)
    scheduler.replica_ready("default-0", slots=4, model_digest=DIGEST, now=7.0)
    task = submit(scheduler, "again", now=8.0, session_id="s2", determinism=SHARED).task
    assert task.lease == Lease("default-0", (0,))
    assert task.placement is not None
    assert "holds its session" not in task.placement
