"""What is loaded, and who leaves for it: models on demand, room, patience, hope."""

from __future__ import annotations

import pytest

from llama_orch.contract.models import ReplicaState, TaskState
from llama_orch.core.effects import Condemn, Load, Unload
from llama_orch.core.fleet import HOPE_S, QUARANTINE_S
from llama_orch.core.ledger import RESERVE_BYTES, Device, Ledger
from llama_orch.core.pool import Pool
from llama_orch.core.scheduler import Scheduler
from llama_orch.testing.builders import DIGEST, GIB, Host, a_device, a_pool, a_scheduler, an_outcome, on_demand, submit

RESIDENCY_S = 30.0


def a_fleet(*pools: Pool, cards: tuple[str, ...] = ("3090",)) -> Scheduler:
    """Everything that loads at the start is ready."""
    scheduler = a_scheduler(Host([a_device(card) for card in cards], list(pools)))
    scheduler.take_effects()
    return scheduler


def loads(scheduler: Scheduler) -> list[str]:
    return [effect.replica_id for effect in scheduler.take_effects() if isinstance(effect, Load)]


def unloads(scheduler: Scheduler) -> list[str]:
    return [effect.replica_id for effect in scheduler.take_effects() if isinstance(effect, Unload)]


def serve(scheduler: Scheduler, pool_id: str, task_id: str, now: float) -> None:
    """One task on an idle or unloaded pool, from its admission to its end."""
    submit(scheduler, task_id, pool_id=pool_id, now=now)
    for replica in scheduler.pools[pool_id].replicas.values():
        if replica.state is ReplicaState.LOADING and replica.is_launched:
            scheduler.replica_ready(replica.replica_id, slots=replica.slots, model_digest=DIGEST, now=now)
    scheduler.finished(task_id, an_outcome(), now)
    scheduler.take_effects()


@pytest.mark.spec("HP-PLC-8")
def test_a_task_has_its_model_loaded_where_there_is_room() -> None:
    """The task waits for its model, and starts when it is there; the model is loaded once."""
    scheduler = a_fleet(on_demand("a", 8))
    task = submit(scheduler, "t", pool_id="a").task
    submit(scheduler, "u", pool_id="a")
    assert loads(scheduler) == ["a-0"]
    scheduler.replica_ready("a-0", slots=4, model_digest=DIGEST, now=3.0)
    assert (task.state, task.replica_id, task.started_s) == (TaskState.RUNNING, "a-0", 3.0)


@pytest.mark.spec("HP-PLC-8")
def test_an_idle_model_makes_room_once_it_has_stayed_long_enough() -> None:
    """Its memory is given away only after it was seen to return."""
    scheduler = a_fleet(on_demand("a", 16), on_demand("b", 16))
    serve(scheduler, "a", "t", 0.0)
    submit(scheduler, "u", pool_id="b", now=1.0)
    assert loads(scheduler) == []
    due = scheduler.next_due()
    assert due == pytest.approx(RESIDENCY_S)
    scheduler.tick(due)
    assert unloads(scheduler) == ["a-0"]
    scheduler.replica_unloaded("a-0", due + 2)
    assert loads(scheduler) == ["b-0"]


@pytest.mark.spec("HP-PLC-8")
def test_a_busy_model_is_left_alone_until_who_waits_has_been_patient() -> None:
    """Then it takes no more tasks, finishes the one that runs, and leaves; its queue waits for its turn."""
    scheduler = a_fleet(on_demand("a", 16), on_demand("b", 16))
    submit(scheduler, "runs", pool_id="a")
    scheduler.replica_ready("a-0", slots=4, model_digest=DIGEST, now=0.0)
    submit(scheduler, "waits", pool_id="a", now=1.0)
    submit(scheduler, "other", pool_id="b", now=1.0)
    patience_s = scheduler.fleet.planner.patience_s(list(scheduler.pools["b"].replicas.values()))
    scheduler.tick(patience_s)
    assert not scheduler.replicas["a-0"].is_closing
    scheduler.tick(1.0 + patience_s)
    assert scheduler.replicas["a-0"].is_closing
    assert unloads(scheduler) == []
    scheduler.finished("runs", an_outcome(), 2.0 + patience_s)
    assert unloads(scheduler) == ["a-0"]
    assert scheduler.tasks["waits"].state is TaskState.QUEUED
    scheduler.replica_unloaded("a-0", 3.0 + patience_s)
    assert loads(scheduler) == ["b-0"]


@pytest.mark.spec("HP-PLC-8")
def test_of_idle_models_the_least_recently_used_leaves() -> None:
    """They cost the same to load again; one that a person configured to stay is never asked."""
    stays = a_pool("stays", need_gib=4)
    scheduler = a_fleet(stays, on_demand("a", 8), on_demand("b", 8), on_demand("c", 8))
    serve(scheduler, "a", "t", 0.0)
    serve(scheduler, "b", "u", 1.0)
    serve(scheduler, "a", "v", 2.0)
    submit(scheduler, "w", pool_id="c", now=100.0)
    assert unloads(scheduler) == ["b-0"]


@pytest.mark.spec("HP-PLC-8")
def test_room_is_kept_for_a_model_that_fits_nowhere_else() -> None:
    """A small model goes to the small card while a large one is known that only the large card can hold."""
    masks = (("3090",), ("3060",))
    alone = a_fleet(on_demand("small", 4, masks=masks), cards=("3090", "3060"))
    submit(alone, "t", pool_id="small")
    assert loads(alone) == ["small-0"]
    both = a_fleet(on_demand("small", 4, masks=masks), on_demand("large", 22), cards=("3090", "3060"))
    submit(both, "t", pool_id="small")
    assert loads(both) == ["small-1"]


@pytest.mark.spec("HP-PLC-4", "HP-PLC-8")
def test_a_model_goes_to_the_card_that_nobody_works_on() -> None:
    """Not to the one with most memory, which it would have to share."""
    masks = (("3090",), ("3060",))
    scheduler = a_fleet(on_demand("a", 4, masks=masks), on_demand("b", 4, masks=masks), cards=("3090", "3060"))
    submit(scheduler, "t", pool_id="a")
    submit(scheduler, "u", pool_id="b")
    assert loads(scheduler) == ["a-0", "b-1"]


@pytest.mark.spec("HP-PLC-4")
def test_a_model_gets_as_many_slots_as_there_is_room_for() -> None:
    """Planned with one, loaded with what fits."""
    pool = on_demand("a", 4)
    (replica,) = pool.replicas.values()
    replica.sizes = tuple({"3060": n * 4 * GIB} for n in range(1, 5))
    replica.device_ids, replica.need_bytes = ("3060",), replica.sizes[0]
    scheduler = a_fleet(pool, cards=("3060",))
    submit(scheduler, "t", pool_id="a")
    assert (replica.slots, replica.need_bytes) == (2, {"3060": 8 * GIB})


@pytest.mark.spec("HP-PLC-8")
def test_an_unused_model_is_unloaded_after_its_keep_alive() -> None:
    """Counted from its last task's end."""
    scheduler = a_fleet(on_demand("a", 8, keep_alive_s=60.0))
    serve(scheduler, "a", "t", 5.0)
    assert scheduler.next_due() == pytest.approx(65.0)
    scheduler.tick(64.9)
    assert unloads(scheduler) == []
    scheduler.tick(65.0)
    assert unloads(scheduler) == ["a-0"]


@pytest.mark.spec("HP-PLC-5", "HP-ERR-4")
def test_nobody_waits_for_ever_for_room_that_nobody_can_make() -> None:
    """Another program has the card: after a minute the task is sent back with the figures."""
    scheduler = a_fleet(on_demand("a", 16))
    scheduler.device_seen("3090", 8 * GIB, 0.0)
    task = submit(scheduler, "t", pool_id="a").task
    assert loads(scheduler) == []
    scheduler.tick(HOPE_S - 1)
    assert task.state is TaskState.QUEUED
    scheduler.tick(HOPE_S)
    assert task.state is TaskState.FAILED
    assert "16,384 MiB are needed on device 3090, which has 7,936" in str(task.error)


@pytest.mark.spec("HP-PLC-7", "HP-PLC-8")
def test_a_model_that_does_not_load_is_given_up_and_tried_again_after_its_quarantine() -> None:
    """Its tasks end with the reason; a minute later a new task has it loaded again."""
    scheduler = a_fleet(on_demand("a", 8))
    task = submit(scheduler, "t", pool_id="a").task
    replica, now = scheduler.replicas["a-0"], 0.0
    while replica.state is not ReplicaState.FAILED:
        scheduler.replica_lost("a-0", "bad file", now)
        now = replica.retry_at_s or now
        scheduler.tick(now)
    assert (task.state, str(task.error).count("bad file")) == (TaskState.FAILED, 1)
    scheduler.take_effects()
    submit(scheduler, "u", pool_id="a", now=now + QUARANTINE_S)
    assert loads(scheduler) == ["a-0"]


@pytest.mark.spec("HP-PLC-5")
def test_a_shortage_is_planned_anew_once() -> None:
    """The need is raised; a second shortage on the same card ends it."""
    scheduler = a_fleet(on_demand("a", 8))
    submit(scheduler, "t", pool_id="a")
    for number in range(2):
        assert loads(scheduler) == ["a-0"]
        scheduler.replica_lost("a-0", "cudaMalloc failed: out of memory", float(number), is_shortage=True)
    replica = scheduler.replicas["a-0"]
    assert (replica.state, loads(scheduler)) == (ReplicaState.FAILED, [])
    assert replica.need_bytes["3090"] > 8 * GIB


@pytest.mark.spec("HP-PLC-7")
def test_a_lost_card_takes_its_replicas_with_it_and_brings_them_back() -> None:
    """What ran there is condemned; nothing is started on it until it is back."""
    scheduler = a_fleet(a_pool(need_gib=8))
    scheduler.device_seen("3090", 0, 1.0, "fell off the bus", is_lost=True)
    assert [e.replica_id for e in scheduler.take_effects() if isinstance(e, Condemn)] == ["default-0"]
    scheduler.replica_lost("default-0", "lost", 1.0)
    scheduler.tick(2.0)
    assert loads(scheduler) == []
    scheduler.device_seen("3090", 24 * GIB, 20.0)
    scheduler.tick(20.0)
    assert loads(scheduler) == ["default-0"]


# -- the ledger --------------------------------------------------------------------------------------------------------


@pytest.mark.spec("HP-PLC-4")
def test_free_is_the_lesser_of_what_the_driver_and_the_ledger_say() -> None:
    """Another program's memory and a replica's are both gone, and neither twice."""
    device = Device("d", "D", "cuda", 24 * GIB, 24 * GIB)
    (replica,) = a_pool(masks=(("d",),), need_gib=8, state=ReplicaState.READY).replicas.values()
    ledger = Ledger([device], {replica.replica_id: replica})
    assert ledger.free_bytes("d") == 16 * GIB - RESERVE_BYTES  # the driver has not seen it yet
    ledger.seen("d", 15 * GIB, None, is_lost=False)  # 8 are the replica's, 1 is somebody's
    assert ledger.free_bytes("d") == 15 * GIB - RESERVE_BYTES
    ledger.seen("d", 20 * GIB, None, is_lost=False)  # it takes less than was thought: never optimistic
    assert ledger.free_bytes("d") == 16 * GIB - RESERVE_BYTES
