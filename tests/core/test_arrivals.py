"""A pool whose model's file is still on its way: who may wait for it, for how long, and what becomes of them."""

from __future__ import annotations

import pytest

from llama_orch.contract.models import ReplicaState, TaskState, Workload
from llama_orch.core.effects import Load
from llama_orch.core.pool import Pool
from llama_orch.core.scheduler import Scheduler
from llama_orch.errors import UpstreamFailed
from llama_orch.testing.builders import a_pool, a_scheduler, on_demand, submit

pytestmark = pytest.mark.spec("HP-PLC-8")


@pytest.fixture
def scheduler() -> Scheduler:
    """One that serves, and one whose model is still to come, for which `a` and `b` wait."""
    scheduler = a_scheduler()
    pool = a_pool("coming", masks=(), is_on_demand=True, workloads=("completion", "embedding"))
    pool.is_arriving = True
    scheduler.fleet.add(pool)
    for name in ("a", "b"):
        wait(scheduler, name)
    return scheduler


def wait(scheduler: Scheduler, name: str, now: float = 0.0, **fields: object) -> None:
    submit(scheduler, name, now=now, pool_id="coming", are_tokens_exact=False, **fields)  # type: ignore[arg-type]


def coming(scheduler: Scheduler) -> Pool:
    return scheduler.pools["coming"]


def come(scheduler: Scheduler, now: float = 1.0, **spec: object) -> None:
    """The file is there."""
    made = on_demand("coming", 2.0, **spec)  # type: ignore[arg-type]
    scheduler.arrivals.came(coming(scheduler), made.spec, made.replicas, now)


@pytest.mark.spec("HP-ADM-5")
def test_who_waits_has_a_place_and_no_predicted_start(scheduler: Scheduler) -> None:
    """For however long: there is nothing of ours that could make it come sooner, and it is not given up."""
    for now in (0.0, 59.0, 3600.0):
        scheduler.tick(now)
        outlooks = [scheduler.predictor.outlook(scheduler.tasks[name], scheduler.tasks, now) for name in ("a", "b")]
        assert [(one.queue_position, one.start_in_s) for one in outlooks] == [(0, None), (1, None)]
    assert coming(scheduler).is_live
    assert not coming(scheduler).is_ready


@pytest.mark.spec("HP-ERR-2")
def test_who_is_told_to_come_again_is_told_when_it_is_expected(scheduler: Scheduler) -> None:
    assert scheduler.predictor.ready_advice_ms(coming(scheduler), 0.0) == 500
    coming(scheduler).arrival_s = 20.0
    assert scheduler.predictor.ready_advice_ms(coming(scheduler), 5.0) == 15_000


def test_once_it_is_there_it_is_loaded_for_those_who_wait(scheduler: Scheduler) -> None:
    """In their order, by the pool that they were admitted to."""
    come(scheduler)
    (replica,) = coming(scheduler).replicas.values()
    assert replica.state is ReplicaState.LOADING
    assert Load(replica.replica_id) in scheduler.take_effects()
    scheduler.replica_ready(replica.replica_id, slots=1, model_digest="sha256:" + "1" * 64, now=2.0)
    assert [scheduler.tasks[name].state for name in ("a", "b")] == [TaskState.RUNNING, TaskState.QUEUED]


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"workload": Workload.EMBEDDING}, "cannot do workload"),
        ({"ctx": 2048}, "has a context of 512 tokens, and the task may need 2048"),
        ({"max_tokens": 500}, "and the task may need 524"),
        ({"engine": "ctransformers"}, "leave `engine` out"),
        ({"inputs": ["x" * 300, "y" * 600]}, "and the task may need 608"),
    ],
)
def test_what_the_model_cannot_do_ends_and_the_rest_stays(
    scheduler: Scheduler, asked: dict[str, object], says: str
) -> None:
    """Nothing was known of it at their admission."""
    wait(scheduler, "c", **asked)
    come(scheduler, ctx=512)
    assert scheduler.tasks["c"].state is TaskState.FAILED
    assert says in str(scheduler.tasks["c"].error)
    assert list(coming(scheduler).queue) == ["a", "b"]


def test_where_it_does_not_come_all_end_and_the_pool_goes(scheduler: Scheduler) -> None:
    """With the reason; nobody else is disturbed."""
    submit(scheduler, "other")
    scheduler.arrivals.failed(coming(scheduler), UpstreamFailed("it answers 404"), 1.0)
    assert {str(scheduler.tasks[name].error) for name in ("a", "b")} == {"it answers 404"}
    assert list(scheduler.pools) == ["default"]
    assert scheduler.tasks["other"].state is TaskState.RUNNING


def test_who_is_canceled_leaves_the_others_waiting(scheduler: Scheduler) -> None:
    scheduler.cancel("a", 1.0)
    assert list(coming(scheduler).queue) == ["b"]
    scheduler.cancel("b", 1.0)
    assert coming(scheduler).is_arriving
    come(scheduler)
    assert not coming(scheduler).is_loaded  # nobody needs it by now


def test_the_end_of_the_service_sends_them_back(scheduler: Scheduler) -> None:
    scheduler.drain(1.0)
    assert [scheduler.tasks[name].state for name in ("a", "b")] == [TaskState.FAILED] * 2
    assert scheduler.is_idle
