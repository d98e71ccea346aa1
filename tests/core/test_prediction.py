"""Predictions of loads and swaps, and speeds for each device. The estimates under them are in test_estimate.py."""

from __future__ import annotations

import pytest

from llama_orch.contract.models import ReplicaState
from llama_orch.core import prediction
from llama_orch.core.estimate import OVERDUE_SHARE
from llama_orch.core.pool import Pool
from llama_orch.core.prediction import Predictor
from llama_orch.core.scheduler import Scheduler
from llama_orch.core.task import Task
from llama_orch.testing.builders import DIGEST, a_device, a_host, a_pool, a_scheduler, an_outcome, on_demand, submit

pytestmark = pytest.mark.spec("HP-PLC-3")


def ready(scheduler: Scheduler, replica_id: str, now: float) -> None:
    scheduler.replica_ready(replica_id, slots=4, model_digest=DIGEST, now=now)


def start_in_s(scheduler: Scheduler, task: Task, now: float) -> float | None:
    return scheduler.predictor.outlooks(task.pool, scheduler.tasks, now)[task.task_id].start_in_s


def swapping(*, keep_alive_s: float = 900.0) -> Scheduler:
    """Two models for one card, both measured: `a` took 4 s to load, `b` 8 s and 10 s with the wait for `a` to leave.
    Each task takes 2 s. At time 100 `b` is loaded and has been idle for some time."""
    pools = [on_demand(name, 16, keep_alive_s=keep_alive_s) for name in ("a", "b")]
    scheduler = Scheduler(pools, [a_device("3090")], retain_s=1e6, min_residency_s=1.0)
    for pool_id, asked_s, launched_s, ready_s in (("a", 0.0, 0.0, 4.0), ("b", 20.0, 22.0, 30.0)):
        for n in range(2):
            submit(scheduler, f"{pool_id}{n}", pool_id=pool_id, now=asked_s + n / 10)
        if pool_id == "b":
            scheduler.replica_unloaded("a-0", launched_s)
        ready(scheduler, f"{pool_id}-0", ready_s)
        for n in range(2):
            scheduler.finished(f"{pool_id}{n}", an_outcome(decode_ms=2000), ready_s + 2.0 * (n + 1))
    scheduler.tick(100.0)
    scheduler.take_effects()
    return scheduler


# -- loads -------------------------------------------------------------------------------------------------------------


@pytest.mark.spec("HP-ADM-5")
def test_nothing_is_predicted_of_a_load_that_was_never_measured() -> None:
    """A cold start is null, also where the model's speed is known from another device."""
    scheduler = a_scheduler(is_ready=False)
    task = submit(scheduler, "t").task
    assert start_in_s(scheduler, task, 1.0) is None
    assert task.predicted_s is None


@pytest.mark.spec("HP-ADM-5", "HP-PLC-8")
def test_a_task_that_waits_for_a_swap_is_told_of_it() -> None:
    """The wait for others to leave is in it, from the moment that they were asked to; then the load alone."""
    scheduler = swapping()
    for n in range(2):
        submit(scheduler, f"a-again{n}", pool_id="a", now=100.0)
    first, second = (scheduler.tasks[f"a-again{n}"] for n in range(2))
    assert scheduler.replicas["a-0"].is_promised
    assert start_in_s(scheduler, first, 100.0) is None  # `a` was loaded into an empty card: its swap was not measured
    scheduler.replica_unloaded("b-0", 102.0)
    assert start_in_s(scheduler, first, 103.0) == pytest.approx(3.0)
    assert start_in_s(scheduler, second, 103.0) == pytest.approx(5.0)
    ready(scheduler, "a-0", 107.0)
    for n in range(2):
        scheduler.finished(f"a-again{n}", an_outcome(decode_ms=2000), 110.0 + n)
    back = submit(scheduler, "b-again", pool_id="b", now=120.0).task
    assert scheduler.replicas["b-0"].is_promised
    assert start_in_s(scheduler, back, 120.0) == pytest.approx(10.0)
    assert back.predicted_s == pytest.approx(130.0)
    assert start_in_s(scheduler, back, 125.0) == pytest.approx(5.0)


def test_a_load_that_takes_longer_than_ever_is_expected_to_take_a_little_more() -> None:
    """It is never told to be over."""
    scheduler = swapping()
    task = submit(scheduler, "t", pool_id="a", now=100.0).task
    scheduler.replica_unloaded("b-0", 101.0)
    assert start_in_s(scheduler, task, 500.0) == pytest.approx(4.0 * OVERDUE_SHARE)


@pytest.mark.spec("HP-PLC-7")
def test_a_restart_is_the_backoff_and_the_load() -> None:
    """Of a model that has been loaded before."""
    scheduler = swapping()
    for n in range(2):
        submit(scheduler, f"t{n}", pool_id="b", now=100.0)
    scheduler.replica_lost("b-0", "gone", 101.0)
    waits = scheduler.tasks["t1"]
    assert start_in_s(scheduler, waits, 101.0) == pytest.approx(0.5 + 8.0)


def test_the_load_is_measured_for_each_device() -> None:
    """A fast card says nothing of a slow one."""
    predictor, pool = Predictor(), a_pool(masks=[["3090"], ["3060"]], state=ReplicaState.UNLOADED)
    fast, slow = pool.replicas.values()
    fast.mark_loading(10.0)
    predictor.learn_load(pool, fast, 13.0)
    assert (predictor.load_s(pool, fast), predictor.load_s(pool, slow)) == (3.0, None)


@pytest.mark.spec("HP-ERR-2")
def test_the_advice_for_a_pool_that_is_not_there_is_its_load() -> None:
    """Loaded, loading, or about to be; where nothing is known, as long again as it has taken so far."""
    scheduler = swapping()
    pool, predictor = scheduler.pools["a"], scheduler.predictor
    assert predictor.ready_advice_ms(pool, 100.0) == 4000
    submit(scheduler, "t", pool_id="a", now=100.0)
    scheduler.replica_unloaded("b-0", 101.0)
    assert predictor.ready_advice_ms(pool, 103.0) == 2000
    cold = a_scheduler(is_ready=False)
    assert cold.predictor.ready_advice_ms(cold.pools["default"], 7.0) == 7000


# -- speeds ------------------------------------------------------------------------------------------------------------


def two_cards(fast_s: float, slow_s: float | None) -> Scheduler:
    scheduler = a_scheduler(a_host("3090+3060"))
    pool = scheduler.pools["default"]
    for replica_id, service_s in (("default-0", fast_s), ("default-1", slow_s)):
        for _ in range(2 if service_s is not None else 0):
            outcome = an_outcome(decode_ms=int(1000 * (service_s or 0)))
            scheduler.predictor.learn(pool, scheduler.replicas[replica_id], service_s or 0.0, outcome)
    return scheduler


def service_s(scheduler: Scheduler, pool: Pool, task: Task, number: int) -> float | None:
    return scheduler.predictor.service_s(pool, task, pool.replicas[f"default-{number}"])


def test_speeds_are_those_of_the_device() -> None:
    """A task takes as long as tasks took there."""
    scheduler = two_cards(1.0, 4.0)
    task = submit(scheduler, "t").task
    assert service_s(scheduler, task.pool, task, 0) == pytest.approx(1.0)
    assert service_s(scheduler, task.pool, task, 1) == pytest.approx(4.0)


def test_a_device_that_was_not_measured_is_taken_for_the_others() -> None:
    """Until something has run there."""
    scheduler = two_cards(1.0, None)
    task = submit(scheduler, "t").task
    assert service_s(scheduler, task.pool, task, 1) == pytest.approx(1.0)
    scheduler.predictor.learn(task.pool, task.pool.replicas["default-1"], 6.0, an_outcome(decode_ms=6000))
    assert service_s(scheduler, task.pool, task, 1) == pytest.approx(6.0)


def test_pools_of_one_model_share_what_was_measured() -> None:
    """Speeds belong to model, engine and device, and not to a pool; another model starts with nothing."""
    predictor = Predictor()
    one, same, other = a_pool("one"), a_pool("same"), a_pool("other", model="another")
    for _ in range(2):
        predictor.learn(one, one.replicas["one-0"], 2.0, an_outcome(decode_ms=2000))
    task = submit(a_scheduler(), "t").task
    assert predictor.service_s(same, task, same.replicas["same-0"]) == pytest.approx(2.0)
    assert predictor.service_s(other, task, other.replicas["other-0"]) is None


def test_each_lane_takes_its_own_time() -> None:
    """A queue over two unequal cards is played forward with the speed of each."""
    scheduler = two_cards(2.0, 3.0)
    for n in range(8):
        submit(scheduler, f"t{n}")
    outlooks = scheduler.predictor.outlooks(scheduler.pools["default"], scheduler.tasks, 0.0)
    starts = [outlook.start_in_s for outlook in outlooks.values()]
    assert starts == pytest.approx([2.0, 3.0, 4.0, 6.0, 6.0, 8.0])


def test_a_backlog_is_the_work_over_the_lanes_that_serve() -> None:
    """None before anything is known, or while nobody serves; a strict task takes a whole replica."""
    scheduler = two_cards(2.0, 2.0)
    pool = scheduler.pools["default"]
    for n in range(8):
        submit(scheduler, f"t{n}")
    assert scheduler.predictor.backlog_s(pool) == pytest.approx(6 * 2.0 / 2)
    scheduler.replicas["default-1"].is_closing = True
    assert scheduler.predictor.backlog_s(pool) == pytest.approx(6 * 2.0)
    assert Predictor().backlog_s(pool) is None


def test_what_is_kept_of_models_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model that was measured the longest time ago is forgotten first."""
    monkeypatch.setattr(prediction, "MODELS_MAX", 2)
    predictor = Predictor()
    pools = [a_pool(f"p{n}", model=f"m{n}") for n in range(3)]
    for n in (0, 1, 0, 2):
        predictor.learn_load(pools[n], pools[n].replicas[f"p{n}-0"], 5.0)
    assert [predictor.load_s(pool, next(iter(pool.replicas.values()))) for pool in pools] == [5.0, None, 5.0]
