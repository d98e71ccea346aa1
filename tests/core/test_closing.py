"""What the catalog's decisions do to a pool: who is refused, who may finish, what is unloaded, and how it returns."""

from __future__ import annotations

import pytest

from llama_orch.contract.models import ErrorCode, ReplicaState, TaskState
from llama_orch.core.bar import Bar, BarKind
from llama_orch.core.effects import Load, Unload
from llama_orch.core.scheduler import Scheduler
from llama_orch.errors import LlorchError, ModelDeprecated, PoolUnavailable, PoolUnready, UntrustedArtifact
from llama_orch.testing.builders import a_scheduler, an_outcome, submit

RETIRED = Bar(BarKind.RETIRED, "it is retired")
UNTRUSTED = Bar(BarKind.UNTRUSTED, "it is another file")
UNVERIFIED = Bar(BarKind.UNVERIFIED, "it is being verified", 700)


@pytest.fixture
def scheduler() -> Scheduler:
    """One pool with one slot that stays loaded; `a` runs and `b` waits."""
    scheduler = a_scheduler(slots=1)
    for name in ("a", "b"):
        submit(scheduler, name)
    assert [scheduler.tasks[name].state for name in ("a", "b")] == [TaskState.RUNNING, TaskState.QUEUED]
    return scheduler


def bar(scheduler: Scheduler, bar: Bar | None, now: float, deadline_s: float | None = None) -> None:
    scheduler.bar_pool(next(iter(scheduler.pools.values())), bar, now, deadline_s)


def state(scheduler: Scheduler) -> ReplicaState:
    (replica,) = scheduler.replicas.values()
    return replica.state


@pytest.mark.spec("HP-ADM-7")
@pytest.mark.parametrize(
    ("reason", "refusal"), [(RETIRED, ModelDeprecated), (UNTRUSTED, UntrustedArtifact), (UNVERIFIED, PoolUnready)]
)
def test_a_barred_model_gets_no_new_tasks(scheduler: Scheduler, reason: Bar, refusal: type[LlorchError]) -> None:
    """With the reason; of one that is being verified with the wait."""
    bar(scheduler, reason, 1.0)
    with pytest.raises(refusal, match=reason.reason) as caught:
        submit(scheduler, "c", now=1.0)
    assert caught.value.retry_after_ms == (700 if reason is UNVERIFIED else None)


@pytest.mark.spec("HP-CTL-3")
def test_a_retired_model_finishes_what_was_admitted_and_is_unloaded(scheduler: Scheduler) -> None:
    """Also what waited; then its worker leaves, and is not loaded again."""
    bar(scheduler, RETIRED, 1.0)
    for name, now in (("a", 2.0), ("b", 3.0)):
        assert state(scheduler) is ReplicaState.READY
        scheduler.finished(name, an_outcome(), now)
    assert [scheduler.tasks[name].state for name in ("a", "b")] == [TaskState.SUCCEEDED] * 2
    (replica_id,) = scheduler.replicas
    assert Unload(replica_id, "drain") in scheduler.take_effects()
    scheduler.replica_unloaded(replica_id, 4.0)
    scheduler.tick(1000.0)
    assert not [effect for effect in scheduler.take_effects() if isinstance(effect, Load)]


@pytest.mark.spec("HP-CTL-3")
def test_what_a_retired_model_has_at_its_deadline_ends(scheduler: Scheduler) -> None:
    """With MODEL_DEPRECATED, running or waiting; a second deadline takes the place of the first."""
    bar(scheduler, RETIRED, 1.0, deadline_s=100.0)
    bar(scheduler, RETIRED, 1.0, deadline_s=5.0)
    assert scheduler.next_due() == 5.0
    scheduler.tick(4.9)
    assert scheduler.tasks["a"].state is TaskState.RUNNING
    scheduler.tick(5.0)
    errors = [scheduler.tasks[name].error for name in ("a", "b")]
    assert [error and error.code for error in errors] == [ErrorCode.MODEL_DEPRECATED] * 2


@pytest.mark.spec("HP-CTL-4")
def test_the_tasks_of_an_untrusted_model_end_at_once(scheduler: Scheduler) -> None:
    bar(scheduler, UNTRUSTED, 1.0)
    errors = [scheduler.tasks[name].error for name in ("a", "b")]
    assert [error and error.code for error in errors] == [ErrorCode.UNTRUSTED_ARTIFACT] * 2
    scheduler.released("a", 1.1)
    (replica_id,) = scheduler.replicas
    assert Unload(replica_id, "drain") in scheduler.take_effects()


def test_a_model_that_is_being_verified_stays_loaded(scheduler: Scheduler) -> None:
    """And goes on with what it has."""
    bar(scheduler, UNVERIFIED, 1.0)
    for name in ("a", "b"):
        scheduler.finished(name, an_outcome(), 2.0)
    assert state(scheduler) is ReplicaState.READY
    bar(scheduler, None, 3.0)
    submit(scheduler, "c", now=3.0)


@pytest.mark.spec("HP-CTL-3")
def test_an_active_model_is_served_again(scheduler: Scheduler) -> None:
    """One that had not left goes on, without the deadline; one that had is loaded again."""
    bar(scheduler, RETIRED, 1.0, deadline_s=5.0)
    bar(scheduler, None, 2.0)
    scheduler.tick(6.0)
    assert scheduler.tasks["a"].state is TaskState.RUNNING
    for name in ("a", "b"):
        scheduler.finished(name, an_outcome(), 7.0)
    bar(scheduler, RETIRED, 8.0)
    (replica_id,) = scheduler.replicas
    scheduler.replica_unloaded(replica_id, 9.0)
    scheduler.take_effects()
    bar(scheduler, None, 10.0)
    assert Load(replica_id) in scheduler.take_effects()


def test_a_drain_outlives_the_retirement(scheduler: Scheduler) -> None:
    """A person drained the pool; that the model is active again does not put the pool back in service."""
    (pool_id,) = scheduler.pools
    bar(scheduler, RETIRED, 1.0)
    scheduler.drain_pool(pool_id, 5.0, 2.0)
    bar(scheduler, None, 3.0)
    with pytest.raises(PoolUnavailable, match="drained"):
        submit(scheduler, "c", now=3.0)
    scheduler.tick(5.0)
    error = scheduler.tasks["a"].error
    assert error is not None
    assert error.code is ErrorCode.POOL_UNAVAILABLE
