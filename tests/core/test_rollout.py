"""Another model in a pool's place: as a whole, or not at all (HP-CTL-2)."""

from __future__ import annotations

from typing import Any

import pytest

from llama_orch.contract.models import ErrorCode, ReplicaState, TaskState
from llama_orch.core.effects import Admitted, Dispose, Ended, Load, Start, Unload
from llama_orch.core.pool import Pool
from llama_orch.core.scheduler import Scheduler
from llama_orch.errors import Conflict, NotFound, PoolUnavailable, PoolUnready
from llama_orch.testing.builders import DIGEST, GIB, a_device, a_pool, an_outcome, on_demand, submit

pytestmark = pytest.mark.spec("HP-CTL-2")
S = ReplicaState
OLD, NEW = "builtin:old", "builtin:new"


def a_successor(need_gib: float, *, number: int = 10, **fields: Any) -> Pool:
    """Its replicas: "default-10" and so on."""
    return a_pool(need_gib=need_gib, model=NEW, state=S.UNLOADED, first_number=number, **fields)


def serving(need_gib: float, *others: Pool, **fields: Any) -> Scheduler:
    """A pool "default" with the old model, loaded, on a card of 24 GiB; and other pools."""
    pool = a_pool(need_gib=need_gib, model=OLD, **fields)
    scheduler = Scheduler([pool, *others], [a_device("3090"), a_device("3060")], retain_s=1e6)
    for replica in pool.replicas.values():
        if replica.state is S.UNLOADED:
            scheduler.want(pool, 0.0)
        ready(scheduler, replica.replica_id, 0.0)
    scheduler.take_effects()
    return scheduler


def ready(scheduler: Scheduler, replica_id: str, now: float) -> list[Any]:
    scheduler.replica_ready(replica_id, slots=scheduler.replicas[replica_id].slots, model_digest=DIGEST, now=now)
    return scheduler.take_effects()


def unloaded(scheduler: Scheduler, replica_id: str, now: float) -> list[Any]:
    scheduler.replica_unloaded(replica_id, now)
    return scheduler.take_effects()


def reload(scheduler: Scheduler, new: Pool, now: float = 1.0) -> list[Any]:
    scheduler.reload_pool("default", new, now)
    return scheduler.take_effects()


def model(scheduler: Scheduler) -> str:
    return scheduler.pools["default"].spec.model


def outcome(scheduler: Scheduler) -> str:
    return str(scheduler.pools["default"].last_reload)


# -- beside ------------------------------------------------------------------------------------------------------------


def test_where_both_have_room_the_old_model_serves_until_the_new_one_does() -> None:
    """Tasks come and go meanwhile; then the new one takes over and the old one leaves."""
    scheduler = serving(8)
    assert reload(scheduler, a_successor(10)) == [Load("default-10")]
    assert outcome(scheduler) == f"loading {NEW} beside {OLD}"
    submit(scheduler, "meanwhile", now=2.0)
    assert scheduler.take_effects() == [Admitted("meanwhile"), Start("meanwhile")]
    scheduler.finished("meanwhile", an_outcome(), 3.0)
    scheduler.take_effects()
    assert ready(scheduler, "default-10", 4.0) == [Unload("default-0", "reload")]
    assert (model(scheduler), outcome(scheduler)) == (NEW, f"done: {NEW} serves in place of {OLD}")
    assert unloaded(scheduler, "default-0", 5.0) == [Dispose("default-0")]
    assert list(scheduler.replicas) == ["default-10"]


def test_tasks_run_on_the_model_that_they_were_admitted_for() -> None:
    """Those that run and those that wait; the old one leaves after the last of them. Counts go on."""
    scheduler = serving(8)
    reload(scheduler, a_successor(10))
    for task_id in ("runs", "waits"):
        submit(scheduler, task_id, now=2.0)
    scheduler.take_effects()
    assert ready(scheduler, "default-10", 3.0) == []
    new = submit(scheduler, "new", now=3.0).task
    assert new.replica_id == "default-10"
    scheduler.take_effects()
    scheduler.finished("runs", an_outcome(), 4.0)
    assert scheduler.take_effects() == [Ended("runs"), Start("waits")]
    assert scheduler.tasks["waits"].pool.spec.model == OLD
    scheduler.finished("waits", an_outcome(), 5.0)
    assert scheduler.take_effects() == [Ended("waits"), Unload("default-0", "reload")]
    assert scheduler.pools["default"].tokens_out == 40


def test_the_old_model_is_restarted_for_those_it_still_has() -> None:
    """Its worker dies after the new model took over: who waits for it is not left."""
    scheduler = serving(8)
    reload(scheduler, a_successor(10))
    for task_id in ("runs", "waits"):
        submit(scheduler, task_id, now=2.0)
    ready(scheduler, "default-10", 3.0)
    scheduler.replica_lost("default-0", "gone", 4.0)
    scheduler.take_effects()
    scheduler.tick(5.0)
    assert scheduler.take_effects() == [Load("default-0")]
    assert ready(scheduler, "default-0", 6.0) == [Start("waits")]


def test_the_new_model_takes_over_once_all_of_its_replicas_serve() -> None:
    """Until then the old one keeps everything."""
    scheduler = serving(4, masks=[["3090"], ["3060"]])
    reload(scheduler, a_successor(4, masks=[["3090"], ["3060"]]))
    assert ready(scheduler, "default-10", 2.0) == []
    assert model(scheduler) == OLD
    assert set(ready(scheduler, "default-11", 3.0)) == {Unload("default-0", "reload"), Unload("default-1", "reload")}
    assert model(scheduler) == NEW


def test_a_load_that_fails_beside_leaves_everything_as_it_was() -> None:
    """The old one never stopped serving; the reason is told, and nothing of the new one is left."""
    scheduler = serving(4, masks=[["3090"], ["3060"]])
    reload(scheduler, a_successor(4, masks=[["3090"], ["3060"]]))
    ready(scheduler, "default-10", 2.0)
    scheduler.replica_lost("default-11", "bad file", 3.0)
    assert scheduler.take_effects() == [Unload("default-10", "reload")]
    assert (model(scheduler), outcome(scheduler)) == (OLD, f"failed: {NEW}: bad file; {OLD} keeps its place")
    assert set(unloaded(scheduler, "default-10", 4.0)) == {Dispose("default-10"), Dispose("default-11")}
    assert submit(scheduler, "t", now=5.0).task.state is TaskState.RUNNING


@pytest.mark.spec("HP-PLC-8")
def test_an_idle_model_on_demand_makes_room_for_a_reload_beside() -> None:
    """The new one is launched once the room is there."""
    scheduler = serving(8, on_demand("m", 12))
    scheduler.want(scheduler.pools["m"], 0.0)
    ready(scheduler, "m-0", 0.0)
    scheduler.tick(100.0)
    assert reload(scheduler, a_successor(10), 100.0) == [Unload("m-0", "evicted")]
    assert outcome(scheduler) == f"loading {NEW} beside {OLD}"
    assert unloaded(scheduler, "m-0", 101.0) == [Load("default-10")]


def test_a_replica_that_waits_for_the_others_of_its_kind_is_not_idle() -> None:
    """Even if their load takes longer than an idle model is kept."""
    fields: dict[str, Any] = {"masks": [["3090"], ["3060"]], "keep_alive_s": 5.0}
    scheduler = serving(4, state=S.LOADING, **fields)
    reload(scheduler, a_successor(4, **fields))
    ready(scheduler, "default-10", 2.0)
    scheduler.tick(100.0)
    scheduler.take_effects()
    ready(scheduler, "default-11", 101.0)
    assert model(scheduler) == NEW


# -- in place ----------------------------------------------------------------------------------------------------------


def test_where_only_one_has_room_the_old_model_finishes_first() -> None:
    """It takes nothing new meanwhile, with the advice to come again; the new one is loaded in its room."""
    scheduler = serving(16)
    for task_id in ("runs", "waits"):
        submit(scheduler, task_id)
    scheduler.take_effects()
    assert reload(scheduler, a_successor(18)) == []
    with pytest.raises(PoolUnready, match="getting another model"):
        submit(scheduler, "new", now=2.0)
    scheduler.finished("runs", an_outcome(), 3.0)
    assert scheduler.take_effects() == [Ended("runs"), Start("waits")]
    scheduler.finished("waits", an_outcome(), 4.0)
    assert scheduler.take_effects() == [Ended("waits"), Unload("default-0", "reload")]
    assert outcome(scheduler) == f"loading {NEW} in place of {OLD}"
    assert unloaded(scheduler, "default-0", 5.0) == [Load("default-10")]
    assert ready(scheduler, "default-10", 6.0) == [Dispose("default-0")]
    assert outcome(scheduler) == f"done: {NEW} serves in place of {OLD}"
    assert submit(scheduler, "later", now=7.0).task.replica_id == "default-10"


@pytest.mark.parametrize("is_shortage", [True, False])
def test_a_load_that_fails_in_place_brings_the_old_model_back(is_shortage: bool) -> None:
    """At once, and the pool takes tasks again."""
    scheduler = serving(16)
    assert reload(scheduler, a_successor(18)) == [Unload("default-0", "reload")]
    unloaded(scheduler, "default-0", 2.0)
    scheduler.replica_lost("default-10", "bad file", 3.0, is_shortage=is_shortage)
    assert scheduler.take_effects() == [Dispose("default-10"), Load("default-0")]
    assert (model(scheduler), outcome(scheduler)) == (OLD, f"failed: {NEW}: bad file; {OLD} keeps its place")
    assert submit(scheduler, "t", now=4.0).task.state is TaskState.QUEUED
    assert ready(scheduler, "default-0", 5.0)[-1] == Start("t")


def test_one_of_several_that_fails_in_place_brings_all_of_the_old_ones_back() -> None:
    """Once those of the new ones that were loaded have left."""
    scheduler = serving(8, masks=[["3090"], ["3060"]])
    reload(scheduler, a_successor(11, masks=[["3090"], ["3060"]]))
    for n in range(2):
        unloaded(scheduler, f"default-{n}", 2.0)
    ready(scheduler, "default-10", 3.0)
    scheduler.replica_lost("default-11", "bad file", 4.0)
    assert set(scheduler.take_effects()) == {Unload("default-10", "reload"), Load("default-0"), Load("default-1")} or (
        scheduler.replicas["default-0"].is_promised
    )
    unloaded(scheduler, "default-10", 5.0)
    for n in range(2):
        ready(scheduler, f"default-{n}", 6.0)
    assert [r.state for r in scheduler.replicas.values()] == [S.READY, S.READY]


def test_room_that_another_program_takes_meanwhile_makes_the_reload_fail_at_once() -> None:
    """With the figures, and without waiting for another event; the old model comes back when there is room."""
    scheduler = serving(16)
    reload(scheduler, a_successor(18))
    scheduler.device_seen("3090", 0, 1.5)
    scheduler.fleet.ledger.devices["3090"].external_bytes = 10 * GIB
    unloaded(scheduler, "default-0", 2.0)
    assert outcome(scheduler).startswith(f"failed: {NEW}: 18,432 MiB are needed on device 3090, which has 14,080;")
    assert scheduler.pools["default"].why_not_loaded is not None
    scheduler.device_seen("3090", 24 * GIB, 3.0)
    scheduler.tick(3.0)
    assert scheduler.take_effects() == [Load("default-0")]


@pytest.mark.spec("HP-PLC-8")
@pytest.mark.parametrize("is_loaded", [True, False])
def test_a_pool_that_is_loaded_on_demand_is_reloaded_as_well(is_loaded: bool) -> None:
    """Its own old model is not driven out to make room beside it: it leaves when it has done its work."""
    fields: dict[str, Any] = {"keep_alive_s": 900.0, "state": S.LOADING if is_loaded else S.UNLOADED}
    pool = a_pool(need_gib=16, model=OLD, **fields)
    scheduler = Scheduler([pool], [a_device("3090")], retain_s=1e6)
    if is_loaded:
        ready(scheduler, "default-0", 0.0)
    effects = reload(scheduler, a_successor(18, keep_alive_s=900.0))
    if is_loaded:
        assert effects == [Unload("default-0", "reload")]
        effects = unloaded(scheduler, "default-0", 2.0)
    assert effects == [Load("default-10")]
    ready(scheduler, "default-10", 3.0)
    assert outcome(scheduler).startswith("done: ")


@pytest.mark.spec("HP-PLC-8")
def test_idle_models_leave_where_the_old_one_is_not_enough() -> None:
    """Also for a pool that is itself loaded on demand: a person has ordered it."""
    scheduler = serving(8, on_demand("m", 8), keep_alive_s=900.0)
    scheduler.want(scheduler.pools["m"], 0.0)
    ready(scheduler, "m-0", 0.0)
    scheduler.tick(100.0)
    effects = reload(scheduler, a_successor(20, keep_alive_s=900.0), 100.0)
    assert effects == [Unload("default-0", "reload"), Unload("m-0", "evicted")]
    assert unloaded(scheduler, "default-0", 101.0) == []
    assert unloaded(scheduler, "m-0", 102.0) == [Load("default-10")]


# -- what comes between ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["beside", "draining", "in place"])
def test_a_drain_ends_a_reload(phase: str) -> None:
    """In each phase: the new one leaves, and the old one is drained."""
    scheduler = serving(8 if phase == "beside" else 16)
    if phase == "draining":
        submit(scheduler, "runs")
        scheduler.take_effects()
    reload(scheduler, a_successor(10 if phase == "beside" else 18))
    if phase == "in place":
        unloaded(scheduler, "default-0", 2.0)
    scheduler.drain_pool("default", 60.0, 3.0)
    assert outcome(scheduler) == f"failed: {NEW}: the pool was drained; {OLD} keeps its place"
    if phase == "draining":
        scheduler.finished("runs", an_outcome(), 4.0)
    for replica in list(scheduler.replicas.values()):
        if replica.state is S.UNLOADING:
            scheduler.replica_unloaded(replica.replica_id, 5.0)
    assert [(r.replica_id, r.state) for r in scheduler.replicas.values()] == [("default-0", S.UNLOADED)]
    with pytest.raises(PoolUnavailable, match="is drained"):
        submit(scheduler, "t", now=6.0)


@pytest.mark.parametrize("is_loaded", [True, False])
def test_a_drained_pool_serves_again_with_its_new_model(is_loaded: bool) -> None:
    """A reload is the way out of a drain; if it fails, the pool stays drained."""
    scheduler = serving(16)
    scheduler.drain_pool("default", 60.0, 1.0)
    unloaded(scheduler, "default-0", 2.0)
    assert reload(scheduler, a_successor(18), 3.0) == [Load("default-10")]
    if is_loaded:
        ready(scheduler, "default-10", 4.0)
        assert submit(scheduler, "t", now=5.0).task.state is TaskState.RUNNING
    else:
        scheduler.replica_lost("default-10", "bad file", 4.0)
        with pytest.raises(PoolUnavailable, match="is drained"):
            submit(scheduler, "t", now=5.0)
        scheduler.tick(100.0)
        assert Load("default-0") not in scheduler.take_effects()


def test_a_pool_whose_replicas_were_given_up_is_mended_by_a_reload() -> None:
    """The message of its refusals says so."""
    scheduler = serving(16)
    scheduler.replicas["default-0"].losses_in_a_row = 100
    scheduler.replica_lost("default-0", "bad file", 1.0)
    with pytest.raises(PoolUnavailable, match="then reload the pool"):
        submit(scheduler, "t", now=2.0)
    assert reload(scheduler, a_successor(18), 3.0) == [Load("default-10")]
    assert ready(scheduler, "default-10", 4.0) == [Dispose("default-0")]
    assert submit(scheduler, "t", now=5.0).task.state is TaskState.RUNNING


def test_a_second_reload_is_a_conflict_until_the_first_is_over() -> None:
    """It changes nothing; afterwards another one can begin."""
    scheduler = serving(4)
    reload(scheduler, a_successor(4))
    with pytest.raises(Conflict, match="is being reloaded already"):
        scheduler.reload_pool("default", a_successor(4, number=20), 2.0)
    assert (scheduler.take_effects(), "default-20" in scheduler.replicas) == ([], False)
    ready(scheduler, "default-10", 3.0)
    assert reload(scheduler, a_successor(4, number=20), 4.0) == [Load("default-20")]


def test_a_reload_of_nothing_or_at_the_end_is_refused() -> None:
    """An unknown pool, and a service that ends."""
    scheduler = serving(4)
    with pytest.raises(NotFound):
        scheduler.reload_pool("nobody", a_successor(4), 1.0)
    scheduler.drain(2.0)
    with pytest.raises(PoolUnavailable, match="the service is ending"):
        scheduler.reload_pool("default", a_successor(4), 3.0)


def test_what_runs_on_a_lost_old_replica_is_told_so_and_the_reload_goes_on() -> None:
    """The old one need not come back first where nobody waits for it."""
    scheduler = serving(16)
    task = submit(scheduler, "runs").task
    reload(scheduler, a_successor(18))
    scheduler.replica_lost("default-0", "gone", 2.0)
    assert task.error is not None
    assert task.error.code is ErrorCode.WORKER_RESET
    assert scheduler.take_effects()[-1] == Load("default-10")


def test_the_ends_of_a_reload_are_noticed_without_another_event() -> None:
    """Nothing is left to be done at the next tick that could have been done now."""
    scheduler = serving(16)
    submit(scheduler, "runs")
    scheduler.take_effects()
    reload(scheduler, a_successor(23.9))
    scheduler.finished("runs", an_outcome(), 2.0)
    assert scheduler.take_effects() == [Ended("runs"), Dispose("default-10")]
    assert outcome(scheduler).startswith(f"failed: {NEW}: 24,474 MiB are needed on device 3090")
    before = outcome(scheduler), dict(scheduler.replicas)
    scheduler.tick(2.0)
    assert (scheduler.take_effects(), (outcome(scheduler), dict(scheduler.replicas))) == ([], before)


def test_nobody_takes_the_old_models_room_before_the_reload_is_decided() -> None:
    """A smaller model in place of a larger one leaves a gap; if it fails, the old one still has its room."""
    other = a_pool("other", need_gib=2, masks=[["3060"]])
    scheduler = serving(20, other)
    ready(scheduler, "other-0", 0.0)
    reload(scheduler, a_successor(14))
    unloaded(scheduler, "default-0", 2.0)
    bigger = a_pool("other", need_gib=8, model=NEW, state=S.UNLOADED, first_number=10)
    scheduler.reload_pool("other", bigger, 3.0)
    assert scheduler.take_effects() == []
    scheduler.replica_lost("default-10", "bad file", 4.0)
    assert set(scheduler.take_effects()) == {Dispose("default-10"), Load("default-0"), Dispose("other-10")}
    assert str(scheduler.pools["other"].last_reload).startswith("failed: ")
