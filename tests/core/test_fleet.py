"""The fleet by examples: what is loaded when it is needed, what leaves, and who is told why nothing comes."""

from __future__ import annotations

from typing import Any

import pytest

from llama_orch.contract.models import Determinism, ErrorCode, ReplicaState, TaskState
from llama_orch.core.effects import Admitted, Condemn, Dispose, Ended, Load, Start, Unload
from llama_orch.core.fleet import HOPE_S, NO_PLACE_RETRY_S, QUARANTINE_S, SHORTAGE_GROWTH, WANTED_S
from llama_orch.core.pool import Pool
from llama_orch.core.replica import BACKOFF_FIRST_S, FAILED_LOADS_MAX
from llama_orch.core.scheduler import Scheduler
from llama_orch.errors import PoolUnavailable
from llama_orch.testing.builders import DIGEST, GIB, a_device, a_pool, an_outcome, on_demand, submit

S = ReplicaState
SHARED = Determinism.BEST_EFFORT


def fleet_of(*pools: Pool, cards: str = "3090", min_residency_s: float = 30.0) -> Scheduler:
    """Retention is no matter here: it wakes nobody."""
    devices = [a_device(card) for card in cards.split("+")]
    return Scheduler(list(pools), devices, retain_s=1e6, min_residency_s=min_residency_s)


def ready(scheduler: Scheduler, replica_id: str, now: float) -> None:
    slots = scheduler.replicas[replica_id].slots
    scheduler.replica_ready(replica_id, slots=slots, model_digest=DIGEST, now=now)


def done(scheduler: Scheduler, pool_id: str, now: float) -> None:
    """A task that loads the pool's model and ends at once."""
    submit(scheduler, f"{pool_id}-at-{now}", now=now, pool_id=pool_id)
    for replica in scheduler.pools[pool_id].replicas.values():
        if replica.state is S.LOADING and replica.is_launched:
            ready(scheduler, replica.replica_id, now)
    scheduler.finished(f"{pool_id}-at-{now}", an_outcome(), now)
    scheduler.take_effects()


def state(scheduler: Scheduler, replica_id: str) -> ReplicaState:
    return scheduler.replicas[replica_id].state


def unloaded(scheduler: Scheduler, replica_id: str, now: float) -> list[Any]:
    scheduler.replica_unloaded(replica_id, now)
    return scheduler.take_effects()


# -- on demand ---------------------------------------------------------------------------------------------------------


@pytest.mark.spec("HP-PLC-8")
def test_a_model_is_loaded_when_a_task_needs_it() -> None:
    """Nothing is loaded before; the task starts when the model serves."""
    scheduler = fleet_of(on_demand("m", 10))
    scheduler.tick(0.0)
    assert (scheduler.take_effects(), scheduler.next_due()) == ([], None)
    submit(scheduler, "t", pool_id="m", now=1.0)
    assert scheduler.take_effects() == [Admitted("t"), Load("m-0")]
    ready(scheduler, "m-0", 3.0)
    assert scheduler.take_effects() == [Start("t")]


@pytest.mark.spec("HP-PLC-8")
def test_a_model_is_loaded_for_somebody_who_could_not_be_queued() -> None:
    """The request will come again: until then, and for a while, the model is not idle."""
    scheduler = fleet_of(on_demand("m", 10, keep_alive_s=1.0))
    scheduler.want(scheduler.pools["m"], 0.0)
    assert scheduler.take_effects() == [Load("m-0")]
    ready(scheduler, "m-0", 2.0)
    scheduler.tick(WANTED_S - 1)
    assert scheduler.take_effects() == []
    assert scheduler.next_due() == WANTED_S
    scheduler.tick(WANTED_S)
    assert scheduler.take_effects() == [Unload("m-0", "idle")]


@pytest.mark.spec("HP-PLC-8")
def test_an_idle_model_is_unloaded_after_its_time() -> None:
    """Counted from the end of its last task; its memory is free once it was seen to return."""
    scheduler = fleet_of(on_demand("m", 10, keep_alive_s=60.0))
    done(scheduler, "m", 5.0)
    assert scheduler.next_due() == 65.0
    scheduler.tick(64.9)
    assert scheduler.take_effects() == []
    scheduler.tick(65.0)
    assert scheduler.take_effects() == [Unload("m-0", "idle")]
    assert scheduler.fleet.ledger.held_bytes("3090") == 10 * GIB
    assert unloaded(scheduler, "m-0", 66.0) == []
    assert scheduler.fleet.ledger.held_bytes("3090") == 0


@pytest.mark.spec("HP-PLC-8")
def test_a_configured_pool_stays_loaded() -> None:
    """However long nobody asks for it, and whoever else does."""
    scheduler = fleet_of(a_pool(need_gib=16), on_demand("m", 10))
    ready(scheduler, "default-0", 0.0)
    task = submit(scheduler, "t", pool_id="m", now=1.0).task
    scheduler.tick(50.0)
    assert (state(scheduler, "default-0"), task.state) == (S.READY, TaskState.QUEUED)
    assert scheduler.pools["m"].why_not_loaded == "10,240 MiB are needed on device 3090, which has 7,936"


@pytest.mark.spec("HP-PLC-8")
def test_idle_models_make_room_and_the_newcomer_waits_for_it() -> None:
    """It is launched only once the memory of those who left is back."""
    scheduler = fleet_of(on_demand("a", 10), on_demand("b", 8), on_demand("new", 12))
    done(scheduler, "b", 0.0)
    done(scheduler, "a", 1.0)
    submit(scheduler, "t", pool_id="new", now=100.0)
    assert scheduler.take_effects() == [Admitted("t"), Unload("b-0", "evicted")]
    assert scheduler.replicas["new-0"].is_promised
    assert unloaded(scheduler, "b-0", 101.0) == [Load("new-0")]
    assert state(scheduler, "a-0") is S.READY


@pytest.mark.spec("HP-PLC-8")
def test_a_model_that_has_only_just_come_is_left_alone() -> None:
    """For 30 s here; then the one who waits is not forgotten."""
    scheduler = fleet_of(on_demand("a", 16), on_demand("b", 16))
    done(scheduler, "a", 0.0)
    submit(scheduler, "t", pool_id="b", now=10.0)
    assert scheduler.take_effects() == [Admitted("t")]
    assert scheduler.next_due() == 30.0
    scheduler.tick(30.0)
    assert scheduler.take_effects() == [Unload("a-0", "evicted")]


@pytest.mark.spec("HP-PLC-8")
@pytest.mark.parametrize("asked_s", [0.1, 1000.1, 123456.7])
def test_the_end_of_a_wait_is_the_end_at_any_time(asked_s: float) -> None:
    """Where the sum of two times is rounded, who waits is woken once and not forgotten."""
    scheduler = fleet_of(on_demand("a", 16), on_demand("b", 16), min_residency_s=29.3)
    done(scheduler, "a", asked_s - 0.4)
    running = submit(scheduler, "runs", pool_id="a", now=asked_s - 0.2).task
    submit(scheduler, "t", pool_id="b", now=asked_s)
    for _ in range(4):
        due = scheduler.next_due()
        if due is None or due > asked_s + 1000:
            break
        scheduler.tick(due)
    assert scheduler.replicas["a-0"].is_closing
    assert running.state is TaskState.RUNNING


@pytest.mark.spec("HP-PLC-8")
def test_a_model_with_work_finishes_it_before_it_leaves() -> None:
    """It takes no more tasks; those who come for it then wait for its next turn."""
    scheduler = fleet_of(on_demand("a", 16), on_demand("b", 16), min_residency_s=1.0)
    done(scheduler, "a", 0.0)
    submit(scheduler, "runs", pool_id="a", now=1.0, determinism=SHARED)
    submit(scheduler, "waits", pool_id="b", now=2.0)
    scheduler.take_effects()
    due = scheduler.next_due()
    assert due is not None
    while not scheduler.replicas["a-0"].is_closing and due is not None:
        scheduler.tick(due)
        due = scheduler.next_due()
    late = submit(scheduler, "late", pool_id="a", now=100.0, determinism=SHARED).task
    assert (late.state, scheduler.take_effects()) == (TaskState.QUEUED, [Admitted("late")])
    scheduler.finished("runs", an_outcome(), 110.0)
    assert scheduler.take_effects() == [Ended("runs"), Unload("a-0", "evicted")]
    assert unloaded(scheduler, "a-0", 111.0) == [Load("b-0")]


@pytest.mark.spec("HP-PLC-8")
def test_who_waits_for_memory_that_is_coming_back_drives_nobody_out() -> None:
    """A model that is being unloaded makes enough room."""
    scheduler = fleet_of(on_demand("a", 10, keep_alive_s=40.0), on_demand("b", 10), on_demand("new", 12))
    done(scheduler, "b", 0.0)
    done(scheduler, "a", 1.0)
    scheduler.tick(41.0)
    assert scheduler.take_effects() == [Unload("a-0", "idle")]
    submit(scheduler, "t", pool_id="new", now=41.5)
    assert scheduler.take_effects() == [Admitted("t")]
    assert unloaded(scheduler, "a-0", 42.0) == [Load("new-0")]
    assert state(scheduler, "b-0") is S.READY


@pytest.mark.spec("HP-PLC-8", "HP-PLC-4")
def test_room_is_kept_for_a_model_that_fits_nowhere_else() -> None:
    """What fits both cards goes to the smaller one, though the larger one is freer."""
    either = on_demand("either", 8, masks=[["3090"], ["3060"]])
    scheduler = fleet_of(either, on_demand("large", 20), cards="3090+3060")
    submit(scheduler, "t", pool_id="either")
    assert scheduler.take_effects() == [Admitted("t"), Load("either-1")]


@pytest.mark.spec("HP-PLC-8")
def test_a_backlog_brings_a_second_replica_where_there_is_room() -> None:
    """Once it is worth its load, and nobody leaves for it."""
    pool = on_demand("m", 8, masks=[["3090"], ["3060"]])
    scheduler = fleet_of(pool, cards="3090+3060")
    for n in range(2):
        submit(scheduler, f"sample-{n}", pool_id="m", now=20.0 * n)
        if n == 0:
            ready(scheduler, "m-0", 1.0)
        scheduler.finished(f"sample-{n}", an_outcome(decode_ms=5000), 20.0 * n + 10.0)
    scheduler.take_effects()
    for n in range(4):
        submit(scheduler, f"t{n}", pool_id="m", now=40.0)
    assert [one for one in scheduler.take_effects() if isinstance(one, Load)] == [Load("m-1")]


@pytest.mark.spec("HP-PLC-4")
def test_what_is_to_stay_goes_before_what_was_loaded_on_demand() -> None:
    """A pool that comes back after a drain and a reload finds its room taken: the others leave, work or not."""
    scheduler = fleet_of(a_pool(need_gib=16), on_demand("m", 20))
    ready(scheduler, "default-0", 0.0)
    scheduler.drain_pool("default", 0.0, 0.0)
    scheduler.replica_unloaded("default-0", 1.0)
    done(scheduler, "m", 2.0)
    submit(scheduler, "runs", pool_id="m", now=3.0)
    scheduler.take_effects()
    scheduler.pools["default"].is_draining = False
    scheduler.tick(4.0)
    assert scheduler.take_effects() == []
    scheduler.finished("runs", an_outcome(), 5.0)
    assert scheduler.take_effects() == [Ended("runs"), Unload("m-0", "evicted")]
    assert unloaded(scheduler, "m-0", 6.0) == [Load("default-0")]


@pytest.mark.spec("HP-PLC-5", "HP-ERR-4")
def test_nobody_waits_for_ever_for_room_that_nobody_of_ours_can_make() -> None:
    """Another program has the card: after a minute the task is sent back with the figures."""
    scheduler = fleet_of(on_demand("m", 16))
    scheduler.device_seen("3090", 8 * GIB, 0.0)
    task = submit(scheduler, "t", pool_id="m").task
    assert scheduler.next_due() == HOPE_S
    scheduler.tick(HOPE_S - 1)
    assert task.state is TaskState.QUEUED
    scheduler.tick(HOPE_S)
    assert task.state is TaskState.FAILED
    assert "16,384 MiB are needed on device 3090, which has 7,936" in str(task.error)


@pytest.mark.spec("HP-PLC-5")
def test_the_end_of_a_hope_that_nobody_has_wakes_nobody() -> None:
    """Somebody asked for a model that has no room, and was not queued: there is nobody to be sent back."""
    scheduler = fleet_of(a_pool(need_gib=16))
    ready(scheduler, "default-0", 0.0)
    scheduler.device_seen("3090", 0, 0.0, "too hot")
    scheduler.replica_lost("default-0", "gone", 0.0)
    scheduler.want(scheduler.pools["default"], 0.0)
    scheduler.tick(1.0)
    assert scheduler.pools["default"].hopeless_since_s is not None
    assert scheduler.next_due() == scheduler.replicas["default-0"].retry_at_s
    submit(scheduler, "t", now=2.0)
    scheduler.replicas["default-0"].retry_at_s = 1000.0
    assert scheduler.next_due() == HOPE_S


@pytest.mark.spec("HP-PLC-4")
def test_a_model_gets_as_many_slots_as_there_is_room_for() -> None:
    """Planned with one, loaded with what fits, and planned with one again once it has left."""
    pool = on_demand("m", 4, masks=[["3060"]], keep_alive_s=60.0)
    (replica,) = pool.replicas.values()
    replica.sizes = tuple({"3060": n * 4 * GIB} for n in range(1, 5))
    scheduler = fleet_of(pool, cards="3060")
    done(scheduler, "m", 0.0)
    assert (replica.slots, replica.need_bytes) == (2, {"3060": 8 * GIB})
    scheduler.tick(60.0)
    scheduler.replica_unloaded("m-0", 61.0)
    assert replica.need_bytes == {"3060": 4 * GIB}


@pytest.mark.spec("HP-PLC-4", "HP-PLC-8")
def test_a_model_goes_to_the_card_that_nobody_works_on() -> None:
    """Not to the one with most memory, which it would have to share."""
    pools = [on_demand(name, 4, masks=[["3090"], ["3060"]]) for name in ("a", "b")]
    scheduler = fleet_of(*pools, cards="3090+3060")
    for pool_id in ("a", "b"):
        submit(scheduler, pool_id, pool_id=pool_id)
    assert [one.replica_id for one in scheduler.take_effects() if isinstance(one, Load)] == ["a-0", "b-1"]


# -- drains ------------------------------------------------------------------------------------------------------------


@pytest.mark.spec("HP-CTL-2")
def test_a_drained_pool_finishes_what_it_has_and_is_unloaded() -> None:
    """Newcomers are refused; what waits is served as long as the deadline has not passed."""
    scheduler = fleet_of(a_pool(need_gib=16))
    ready(scheduler, "default-0", 0.0)
    submit(scheduler, "runs")
    submit(scheduler, "waits")
    scheduler.take_effects()
    scheduler.drain_pool("default", 60.0, 1.0)
    with pytest.raises(PoolUnavailable, match="is drained and takes no new tasks") as caught:
        submit(scheduler, "new", now=2.0)
    assert caught.value.retry_after_ms == 60_000
    scheduler.finished("runs", an_outcome(), 3.0)
    assert scheduler.take_effects() == [Ended("runs"), Start("waits")]
    scheduler.finished("waits", an_outcome(), 4.0)
    assert scheduler.take_effects() == [Ended("waits"), Unload("default-0", "drain")]
    assert (unloaded(scheduler, "default-0", 5.0), state(scheduler, "default-0")) == ([], S.UNLOADED)


@pytest.mark.spec("HP-CTL-2")
def test_a_drains_deadline_ends_what_is_left() -> None:
    """The running task is aborted, the waiting one is sent back, and the model leaves once the engine has let go."""
    scheduler = fleet_of(a_pool(need_gib=16))
    ready(scheduler, "default-0", 0.0)
    tasks = [submit(scheduler, task_id).task for task_id in ("runs", "waits")]
    scheduler.drain_pool("default", 60.0, 1.0)
    assert scheduler.next_due() == 60.0
    scheduler.tick(60.0)
    assert [task.error.code for task in tasks if task.error is not None] == [ErrorCode.POOL_UNAVAILABLE] * 2
    scheduler.take_effects()
    scheduler.released("runs", 61.0)
    assert scheduler.take_effects() == [Unload("default-0", "drain")]


@pytest.mark.spec("HP-CTL-2")
def test_the_deadline_of_a_drain_with_nothing_left_wakes_nobody() -> None:
    """And a refusal after it does not tell the client to come back at once."""
    scheduler = fleet_of(a_pool(need_gib=16))
    ready(scheduler, "default-0", 0.0)
    scheduler.drain_pool("default", 60.0, 1.0)
    assert scheduler.next_due() is None
    with pytest.raises(PoolUnavailable) as caught:
        submit(scheduler, "new", now=100.0)
    assert caught.value.retry_after_ms is not None
    assert caught.value.retry_after_ms >= 1000


@pytest.mark.spec("HP-CTL-2", "HP-PLC-8")
def test_a_drain_ends_the_wish_for_a_model() -> None:
    """Who asked a moment before does not have it loaded again, and unloaded, and loaded again."""
    scheduler = fleet_of(on_demand("m", 10, is_on_demand=False))
    scheduler.want(scheduler.pools["m"], 0.0)
    ready(scheduler, "m-0", 1.0)
    scheduler.take_effects()
    scheduler.drain_pool("m", 2.0, 2.0)
    assert scheduler.take_effects() == [Unload("m-0", "drain")]
    assert unloaded(scheduler, "m-0", 3.0) == []
    scheduler.want(scheduler.pools["m"], 4.0)
    scheduler.tick(5.0)
    assert scheduler.take_effects() == []


@pytest.mark.spec("HP-CTL-2", "HP-PLC-8")
def test_a_drain_ends_what_waits_for_a_model_that_is_not_loaded_yet() -> None:
    """At its deadline; and then the next task begins anew, since nothing of an on-demand pool is left to be drained."""
    scheduler = fleet_of(a_pool(need_gib=16), on_demand("m", 10))
    ready(scheduler, "default-0", 0.0)
    task = submit(scheduler, "waits", pool_id="m").task
    scheduler.drain_pool("m", 60.0, 1.0)
    assert (task.state, scheduler.pools["m"].is_draining) == (TaskState.QUEUED, True)
    scheduler.tick(60.0)
    assert (task.state, scheduler.pools["m"].is_draining) == (TaskState.FAILED, False)


# -- losses ------------------------------------------------------------------------------------------------------------


@pytest.mark.spec("HP-PLC-7")
def test_what_nobody_needs_is_not_started_again() -> None:
    """A worker of an idle model on demand dies: its memory is free after the backoff."""
    scheduler = fleet_of(on_demand("m", 10))
    done(scheduler, "m", 0.0)
    scheduler.replica_lost("m-0", "gone", 1.0)
    assert scheduler.next_due() == 1.0 + BACKOFF_FIRST_S
    scheduler.tick(1.0 + BACKOFF_FIRST_S)
    assert (state(scheduler, "m-0"), scheduler.take_effects()) == (S.UNLOADED, [])


@pytest.mark.spec("HP-PLC-7", "HP-PLC-8")
def test_a_model_that_cannot_be_loaded_is_quarantined() -> None:
    """Those who wait hear of it soon, newcomers are refused for a minute, and then it is tried again."""
    scheduler = fleet_of(on_demand("m", 10))
    task = submit(scheduler, "t", pool_id="m").task
    now = 0.0
    for _ in range(FAILED_LOADS_MAX + 1):
        scheduler.replica_lost("m-0", "bad file", now)
        now = scheduler.replicas["m-0"].retry_at_s or now
        scheduler.tick(now)
    assert (task.state, state(scheduler, "m-0")) == (TaskState.FAILED, S.FAILED)
    with pytest.raises(PoolUnavailable, match="bad file"):
        submit(scheduler, "soon", pool_id="m", now=now + QUARANTINE_S - 1)
    scheduler.take_effects()
    submit(scheduler, "later", pool_id="m", now=now + QUARANTINE_S)
    assert scheduler.take_effects() == [Admitted("later"), Load("m-0")]


@pytest.mark.spec("HP-PLC-7", "HP-PLC-8")
def test_a_configured_model_on_demand_is_tried_again_as_well() -> None:
    """It is loaded in the same way, so that a game that took its memory does not end it for good."""
    scheduler = fleet_of(on_demand("m", 10, is_on_demand=False))
    submit(scheduler, "t", pool_id="m")
    for _ in range(2):
        scheduler.replica_lost("m-0", "out of memory", 1.0, is_shortage=True)
    assert state(scheduler, "m-0") is S.FAILED
    assert submit(scheduler, "later", pool_id="m", now=1.0 + QUARANTINE_S).task.state is TaskState.QUEUED
    assert state(scheduler, "m-0") is S.LOADING


@pytest.mark.spec("HP-PLC-8")
def test_a_quarantined_place_is_tried_again_where_there_is_no_other_one() -> None:
    """Once who waited for it was sent back, and somebody comes again."""
    pool = on_demand("m", 10, masks=[["3090"], ["3060"]])
    scheduler = fleet_of(a_pool(need_gib=4, masks=[["3060"]]), pool, cards="3090+3060")
    ready(scheduler, "default-0", 0.0)
    task = submit(scheduler, "t", pool_id="m").task
    for _ in range(2):
        scheduler.replica_lost("m-0", "out of memory", 1.0, is_shortage=True)
    scheduler.take_effects()
    assert (task.state, state(scheduler, "m-0")) == (TaskState.QUEUED, S.FAILED)
    scheduler.tick(1.0 + max(HOPE_S, QUARANTINE_S))
    assert scheduler.take_effects() == [Ended("t")]
    submit(scheduler, "u", pool_id="m", now=100.0)
    assert scheduler.take_effects() == [Admitted("u"), Load("m-0")]


@pytest.mark.spec("HP-PLC-5", "HP-PLC-8")
def test_a_lack_of_memory_makes_a_load_be_planned_anew_with_more() -> None:
    """Once; a second one in a row gives the place up."""
    scheduler = fleet_of(on_demand("m", 10))
    submit(scheduler, "t", pool_id="m")
    scheduler.take_effects()
    scheduler.replica_lost("m-0", "out of memory", 1.0, is_shortage=True)
    assert scheduler.take_effects() == [Load("m-0")]
    assert scheduler.replicas["m-0"].need_bytes == {"3090": round(10 * GIB * SHORTAGE_GROWTH)}
    scheduler.replica_lost("m-0", "out of memory", 2.0, is_shortage=True)
    assert state(scheduler, "m-0") is S.FAILED


@pytest.mark.spec("HP-PLC-4", "HP-PLC-7")
def test_a_place_whose_last_process_is_still_there_is_planned_when_that_is_gone() -> None:
    """Nobody else has to leave for it, and its need does not change under the process."""
    scheduler = fleet_of(on_demand("m", 16), on_demand("idle", 6))
    done(scheduler, "idle", 0.0)
    submit(scheduler, "t", pool_id="m", now=100.0)
    scheduler.take_effects()
    scheduler.replica_lost("m-0", "out of memory", 101.0, is_shortage=True, is_gone=False)
    scheduler.tick(102.0)
    assert scheduler.take_effects() == []
    assert scheduler.fleet.ledger.held_bytes("3090") == (16 + 6) * GIB
    scheduler.replica_gone("m-0", 103.0)
    assert scheduler.take_effects() == [Unload("idle-0", "evicted")]
    assert unloaded(scheduler, "idle-0", 104.0) == [Load("m-0")]


@pytest.mark.spec("HP-PLC-7")
def test_a_serving_model_on_demand_that_runs_short_is_planned_anew() -> None:
    """Its tasks end, and the next one finds it again."""
    scheduler = fleet_of(on_demand("m", 10))
    submit(scheduler, "t", pool_id="m")
    ready(scheduler, "m-0", 1.0)
    scheduler.replica_lost("m-0", "out of memory", 2.0, is_shortage=True)
    assert state(scheduler, "m-0") is S.UNLOADED
    scheduler.take_effects()
    submit(scheduler, "next", pool_id="m", now=3.0)
    assert scheduler.take_effects() == [Admitted("next"), Load("m-0")]


@pytest.mark.spec("HP-PLC-7")
def test_a_loss_that_crosses_an_unload_is_the_same_end() -> None:
    """A worker was told to end and died before: the end is reported once more, as the unload's."""
    scheduler = fleet_of(on_demand("m", 10, keep_alive_s=1.0))
    done(scheduler, "m", 0.0)
    scheduler.tick(1.0)
    scheduler.replica_lost("m-0", "its card is lost", 1.0, is_gone=False)
    assert state(scheduler, "m-0") is S.UNLOADING
    scheduler.replica_unloaded("m-0", 2.0)
    assert scheduler.fleet.ledger.held_bytes("3090") == 0
    scheduler.replica_lost("m-0", "told late", 2.0)
    assert state(scheduler, "m-0") is S.UNLOADED


@pytest.mark.spec("HP-PLC-8")
def test_a_victim_that_dies_for_good_while_it_finishes_leaves_its_room() -> None:
    """The newcomer does not wait for its end, and the victim can be loaded again later."""
    scheduler = fleet_of(on_demand("a", 16), on_demand("b", 16), min_residency_s=0.0)
    done(scheduler, "a", 0.0)
    submit(scheduler, "runs", pool_id="a", now=1.0)
    submit(scheduler, "waits", pool_id="b", now=1.0)
    for _ in range(3):
        scheduler.tick(scheduler.next_due() or 1.0)
    victim = scheduler.replicas["a-0"]
    assert victim.is_closing
    victim.losses_in_a_row = 100
    scheduler.take_effects()
    scheduler.replica_lost("a-0", "gone", 100.0)
    assert Load("b-0") in scheduler.take_effects()
    ready(scheduler, "b-0", 101.0)
    scheduler.finished("waits", an_outcome(), 102.0)
    submit(scheduler, "again", pool_id="a", now=102.0 + QUARANTINE_S)
    scheduler.take_effects()
    unloaded(scheduler, "b-0", 103.0 + QUARANTINE_S)
    ready(scheduler, "a-0", 104.0 + QUARANTINE_S)
    assert scheduler.take_effects() == [Start("again")]


@pytest.mark.spec("HP-PLC-4", "HP-PLC-7")
def test_nothing_is_started_again_into_memory_that_another_program_has_taken() -> None:
    """What is to stay waits for it without being given up; what was loaded on demand is planned anew."""
    stays, comes = a_pool(need_gib=10), on_demand("m", 8, masks=[["3090"], ["3060"]])
    scheduler = fleet_of(stays, comes, cards="3090+3060")
    ready(scheduler, "default-0", 0.0)
    submit(scheduler, "t", pool_id="m")
    ready(scheduler, "m-0", 1.0)
    submit(scheduler, "next", pool_id="m", now=1.0)
    scheduler.take_effects()
    for replica_id in ("default-0", "m-0"):
        scheduler.replica_lost(replica_id, "gone", 2.0)
    scheduler.device_seen("3090", 0, 2.2)
    scheduler.fleet.ledger.devices["3090"].external_bytes = 24 * GIB
    scheduler.take_effects()
    scheduler.tick(2.0 + BACKOFF_FIRST_S)
    assert scheduler.take_effects() == [Load("m-1")]
    assert scheduler.replicas["default-0"].retry_at_s == 2.0 + BACKOFF_FIRST_S + NO_PLACE_RETRY_S
    scheduler.fleet.ledger.devices["3090"].external_bytes = 0
    scheduler.tick(2.0 + BACKOFF_FIRST_S + NO_PLACE_RETRY_S)
    assert scheduler.take_effects() == [Load("default-0")]


# -- devices -----------------------------------------------------------------------------------------------------------


def lose_card(scheduler: Scheduler, now: float, device_id: str = "3090") -> None:
    scheduler.device_seen(device_id, 0, now, "fell off the bus", is_lost=True)


def card_returns(scheduler: Scheduler, now: float, device_id: str = "3090") -> None:
    device = scheduler.devices[device_id]
    scheduler.device_seen(device_id, device.vram_total_bytes, now)
    scheduler.tick(now)


@pytest.mark.spec("HP-PLC-7")
def test_a_lost_card_condemns_what_runs_on_it_and_sends_back_who_waits() -> None:
    """Once; the pool serves again when the card is back."""
    scheduler = fleet_of(a_pool(need_gib=10))
    ready(scheduler, "default-0", 0.0)
    tasks = [submit(scheduler, task_id).task for task_id in ("runs", "waits")]
    scheduler.take_effects()
    for _ in range(2):
        lose_card(scheduler, 1.0)
    reason = "device 3090 is lost: fell off the bus"
    assert scheduler.take_effects() == [Condemn("default-0", reason), Ended("waits")]
    scheduler.replica_lost("default-0", reason, 1.0)
    codes = [task.error.code for task in tasks if task.error is not None]
    assert codes == [ErrorCode.WORKER_RESET, ErrorCode.POOL_UNAVAILABLE]
    with pytest.raises(PoolUnavailable, match="fell off the bus"):
        submit(scheduler, "new", now=2.0)
    scheduler.tick(60.0)
    scheduler.take_effects()
    card_returns(scheduler, 61.0)
    scheduler.tick(scheduler.next_due() or 0.0)
    assert scheduler.take_effects() == [Load("default-0")]


@pytest.mark.spec("HP-PLC-7")
def test_nothing_is_placed_on_a_card_that_is_lost() -> None:
    """Not even before the loss of its worker was reported; the other card goes on."""
    scheduler = fleet_of(a_pool(need_gib=4, masks=[["3090"], ["3060"]]), cards="3090+3060")
    for n in range(2):
        ready(scheduler, f"default-{n}", 0.0)
    lose_card(scheduler, 1.0)
    assert [submit(scheduler, task_id, now=1.0).task.replica_id for task_id in ("a", "b")] == ["default-1", None]


@pytest.mark.spec("HP-PLC-7")
def test_a_worker_that_gets_ready_on_a_lost_card_is_condemned() -> None:
    """Its report was under way when the card went."""
    scheduler = fleet_of(a_pool(need_gib=4))
    lose_card(scheduler, 1.0)
    ready(scheduler, "default-0", 1.0)
    assert scheduler.take_effects() == [Condemn("default-0", "device 3090 is lost: fell off the bus")]


@pytest.mark.spec("HP-PLC-7", "HP-PLC-8")
def test_a_model_whose_card_is_lost_is_loaded_on_another_one() -> None:
    """It does not wait for the card while another place would do."""
    scheduler = fleet_of(on_demand("m", 8, masks=[["3090"], ["3060"]]), cards="3090+3060")
    submit(scheduler, "runs", pool_id="m")
    ready(scheduler, "m-0", 1.0)
    submit(scheduler, "waits", pool_id="m", now=1.0)
    lose_card(scheduler, 2.0)
    scheduler.replica_lost("m-0", "its card is lost", 2.0)
    scheduler.take_effects()
    scheduler.tick(2.0 + BACKOFF_FIRST_S)
    assert scheduler.take_effects() == [Load("m-1")]


@pytest.mark.spec("HP-PLC-7")
def test_who_waits_is_sent_back_when_the_last_sound_replica_is_given_up() -> None:
    """The other one's card is lost, so that nobody is left to come."""
    scheduler = fleet_of(a_pool(need_gib=4, masks=[["3090"], ["3060"]]), cards="3090+3060")
    for n in range(2):
        ready(scheduler, f"default-{n}", 0.0)
    lose_card(scheduler, 1.0)
    scheduler.replica_lost("default-0", "its card is lost", 1.0)
    tasks = [submit(scheduler, task_id, now=1.0).task for task_id in ("runs", "waits")]
    scheduler.replicas["default-1"].losses_in_a_row = 100
    scheduler.replica_lost("default-1", "gone", 2.0)
    assert [task.state for task in tasks] == [TaskState.FAILED] * 2


@pytest.mark.spec("HP-PLC-7")
def test_a_card_that_cannot_be_used_now_takes_no_new_models() -> None:
    """Those who wait are told; what is to stay is tried again now and then."""
    scheduler = fleet_of(on_demand("m", 10))
    scheduler.device_seen("3090", 0, 0.0, "too hot")
    submit(scheduler, "t", pool_id="m", now=1.0)
    assert scheduler.take_effects() == [Admitted("t")]
    assert scheduler.pools["m"].why_not_loaded == "device 3090 cannot be used (too hot)"
    card_returns(scheduler, 2.0)
    assert scheduler.take_effects() == [Load("m-0")]
    assert scheduler.pools["m"].why_not_loaded is None


# -- the list of pools -------------------------------------------------------------------------------------------------


@pytest.mark.spec("HP-PLC-8")
def test_a_pool_can_be_added_and_removed() -> None:
    """Its replicas are disposed of, and nothing of them is left."""
    scheduler = fleet_of(a_pool(need_gib=4))
    pool = on_demand("m", 10)
    scheduler.fleet.add(pool)
    done(scheduler, "m", 0.0)
    scheduler.replica_lost("m-0", "gone", 1.0)
    scheduler.tick(2.0)
    scheduler.take_effects()
    scheduler.fleet.remove(pool)
    assert scheduler.take_effects() == [Dispose("m-0")]
    assert (list(scheduler.pools), list(scheduler.replicas)) == (["default"], ["default-0"])


def test_a_cards_busy_share_is_that_of_its_slots() -> None:
    """Over all that is loaded there; an empty card is idle."""
    scheduler = fleet_of(a_pool(need_gib=4), on_demand("m", 4, slots=2), cards="3090+3060")
    ready(scheduler, "default-0", 0.0)
    done(scheduler, "m", 0.0)
    submit(scheduler, "t", now=1.0, determinism=SHARED)
    submit(scheduler, "u", pool_id="m", now=1.0, determinism=SHARED)
    assert scheduler.fleet.busy_share("3090") == pytest.approx(2 / 6)
    assert scheduler.fleet.busy_share("3060") == 0.0


def test_what_a_replica_was_seen_to_take_replaces_what_was_predicted() -> None:
    """For the devices that were measured; the rest stays as predicted."""
    scheduler = fleet_of(a_pool(need_gib=8, masks=[["3090", "3060"]]), cards="3090+3060")
    scheduler.fleet.measured("default-0", {"3090": 3 * GIB})
    assert scheduler.replicas["default-0"].need_bytes == {"3090": 3 * GIB, "3060": 4 * GIB}
