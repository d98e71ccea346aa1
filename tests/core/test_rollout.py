"""A reload ends with the new model in service or the old one still, and loses no task (HP-CTL-2)."""

from __future__ import annotations

import pytest

from llama_orch.contract.models import ErrorCode, ReplicaState, TaskState
from llama_orch.core.effects import Dispose, Load, Unload
from llama_orch.core.pool import Pool
from llama_orch.core.scheduler import Scheduler
from llama_orch.errors import Conflict, PoolUnavailable, PoolUnready
from llama_orch.testing.builders import DIGEST, Host, a_device, a_pool, a_scheduler, an_outcome, submit

pytestmark = pytest.mark.spec("HP-CTL-2")
NEW_DIGEST = "sha256:" + "1" * 64


def a_service(need_gib: float) -> Scheduler:
    """One ready replica of this size on a card of 24 GiB."""
    scheduler = a_scheduler(Host([a_device("3090")], [a_pool(need_gib=need_gib)]))
    scheduler.take_effects()
    return scheduler


def successor(need_gib: float) -> Pool:
    return a_pool(need_gib=need_gib, state=ReplicaState.UNLOADED, first_number=1, model="builtin:new")


def done(scheduler: Scheduler) -> list[str]:
    kinds = (Load, Unload, Dispose)
    return [f"{type(e).__name__} {e.replica_id}" for e in scheduler.take_effects() if isinstance(e, kinds)]


def outcome(scheduler: Scheduler) -> str:
    return (scheduler.pools["default"].last_reload or "").partition(" ")[0]


def ready(scheduler: Scheduler, replica_id: str, now: float) -> None:
    scheduler.replica_ready(replica_id, slots=4, model_digest=NEW_DIGEST, now=now)


def test_beside_the_old_model_serves_until_the_new_one_does() -> None:
    """Who was admitted before runs on the old model, who comes later on the new one; then the old one goes."""
    scheduler = a_service(8)
    before = [submit(scheduler, task_id).task for task_id in ("runs", "waits")]
    scheduler.take_effects()
    scheduler.reload_pool("default", successor(8), 1.0)
    assert (done(scheduler), outcome(scheduler)) == (["Load default-1"], "loading")
    ready(scheduler, "default-1", 2.0)
    assert outcome(scheduler) == "done:"
    after = submit(scheduler, "after", now=3.0).task
    scheduler.finished("runs", an_outcome(), 4.0)
    assert [task.replica_id for task in (*before, after)] == ["default-0", "default-0", "default-1"]
    assert done(scheduler) == []
    scheduler.finished("waits", an_outcome(), 5.0)
    assert done(scheduler) == ["Unload default-0"]
    scheduler.replica_unloaded("default-0", 6.0)
    assert done(scheduler) == ["Dispose default-0"]
    assert (scheduler.pools["default"].spec.model, list(scheduler.replicas)) == ("builtin:new", ["default-1"])


def test_in_place_the_old_model_finishes_first_and_newcomers_wait() -> None:
    """Without room for both: 503 meanwhile, the old one leaves, the new one takes its room."""
    scheduler = a_service(16)
    task = submit(scheduler, "runs").task
    scheduler.take_effects()
    scheduler.reload_pool("default", successor(16), 1.0)
    assert (done(scheduler), outcome(scheduler)) == ([], "waiting")
    with pytest.raises(PoolUnready, match="is getting another model"):
        submit(scheduler, "newcomer", now=1.5)
    scheduler.finished("runs", an_outcome(), 2.0)
    assert (task.state, done(scheduler)) == (TaskState.SUCCEEDED, ["Unload default-0"])
    scheduler.replica_unloaded("default-0", 3.0)
    assert done(scheduler) == ["Load default-1"]
    ready(scheduler, "default-1", 4.0)
    assert outcome(scheduler) == "done:"
    assert submit(scheduler, "newcomer", now=5.0).task.replica_id == "default-1"


@pytest.mark.parametrize("need_gib", [8, 16])
def test_a_new_model_that_does_not_load_leaves_the_old_one_in_service(need_gib: float) -> None:
    """Beside it never stopped serving; in place it is brought back."""
    scheduler = a_service(need_gib)
    scheduler.reload_pool("default", successor(need_gib), 1.0)
    if need_gib == 16:
        scheduler.replica_unloaded("default-0", 2.0)
    scheduler.replica_lost("default-1", "unknown model architecture", 3.0)
    assert outcome(scheduler) == "failed:"
    assert "unknown model architecture" in (scheduler.pools["default"].last_reload or "")
    if need_gib == 16:
        assert "Load default-0" in done(scheduler)
        scheduler.replica_ready("default-0", slots=4, model_digest=DIGEST, now=5.0)
    assert submit(scheduler, "after", now=6.0).task.replica_id == "default-0"
    assert list(scheduler.replicas) == ["default-0"]


def test_one_reload_at_a_time() -> None:
    """The second one is a conflict and changes nothing."""
    scheduler = a_service(8)
    scheduler.reload_pool("default", successor(8), 1.0)
    with pytest.raises(Conflict, match="is being reloaded already"):
        scheduler.reload_pool("default", a_pool(state=ReplicaState.UNLOADED, first_number=2), 2.0)
    assert set(scheduler.replicas) == {"default-0", "default-1"}


def test_a_drain_finishes_what_is_there_and_then_unloads() -> None:
    """Running and waiting tasks end as ever; newcomers are refused."""
    scheduler = a_service(8)
    tasks = [submit(scheduler, task_id).task for task_id in ("runs", "waits")]
    scheduler.drain_pool("default", 60.0, 1.0)
    with pytest.raises(PoolUnavailable, match="is drained"):
        submit(scheduler, "newcomer", now=2.0)
    for task in tasks:
        assert done(scheduler) == []
        scheduler.finished(task.task_id, an_outcome(), 3.0)
    assert [task.state for task in tasks] == [TaskState.SUCCEEDED] * 2
    assert done(scheduler) == ["Unload default-0"]


def test_at_a_drains_deadline_the_rest_ends() -> None:
    """With POOL_UNAVAILABLE, whether it runs or waits."""
    scheduler = a_service(8)
    tasks = [submit(scheduler, task_id).task for task_id in ("runs", "waits")]
    scheduler.drain_pool("default", 10.0, 1.0)
    assert scheduler.next_due() == 10.0
    scheduler.tick(10.0)
    assert [task.error and task.error.code for task in tasks] == [ErrorCode.POOL_UNAVAILABLE] * 2
    scheduler.released("runs", 10.1)
    assert done(scheduler) == ["Unload default-0"]


def test_a_reload_ends_a_drain_and_a_drain_a_reload() -> None:
    """The pool is back with the new model; a drain in the middle of a reload means that the pool is to be empty."""
    scheduler = a_service(8)
    scheduler.drain_pool("default", 1.0, 0.0)
    scheduler.replica_unloaded("default-0", 1.0)
    scheduler.reload_pool("default", successor(8), 2.0)
    ready(scheduler, "default-1", 3.0)
    assert submit(scheduler, "t", now=4.0).task.state is TaskState.RUNNING
    other = a_service(8)
    other.reload_pool("default", successor(8), 1.0)
    other.drain_pool("default", 9.0, 2.0)
    assert (outcome(other), other.pools["default"].is_draining) == ("failed:", True)
    assert {replica.state for replica in other.replicas.values()} == {ReplicaState.UNLOADING}
