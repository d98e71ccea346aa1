"""Predictions: honest when nothing is known, and true when tasks take what they said. Loads, swaps, devices."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_orch.contract.models import Determinism, Priority, ReplicaState
from llama_orch.core import prediction
from llama_orch.core.course import EXACT_MAX
from llama_orch.core.effects import Start
from llama_orch.core.estimate import OVERDUE_SHARE
from llama_orch.core.pool import Pool
from llama_orch.core.prediction import ADVICE_MAX_MS, ADVICE_MIN_MS, Predictor
from llama_orch.core.scheduler import Scheduler
from llama_orch.core.task import Task
from llama_orch.testing.builders import DIGEST, a_device, a_host, a_pool, a_scheduler, an_outcome, on_demand, submit

pytestmark = pytest.mark.spec("HP-PLC-3")
PROPERTY = settings(max_examples=200, derandomize=True, deadline=None, database=None)
SHARED = Determinism.BEST_EFFORT


def ready(scheduler: Scheduler, replica_id: str, now: float) -> None:
    scheduler.replica_ready(replica_id, slots=4, model_digest=DIGEST, now=now)


def task_start_in_s(scheduler: Scheduler, task: Task, now: float) -> float | None:
    if task.task_id not in list(task.pool.queue):
        return None
    return scheduler.predictor.outlook(task, scheduler.tasks, now).start_in_s


def measured(scheduler: Scheduler, *, tokens: int = 20) -> Scheduler:
    """After two tasks that took 1.5 s each, 1 s of it for `tokens` tokens, at time 3.0."""
    for n in range(2):
        submit(scheduler, f"sample-{n}", now=1.5 * n)
        scheduler.finished(f"sample-{n}", an_outcome(tokens_out=tokens), 1.5 * (n + 1))
    scheduler.take_effects()
    return scheduler


def start_in_s(scheduler: Scheduler, task_id: str, now: float) -> float | None:
    return task_start_in_s(scheduler, scheduler.tasks[task_id], now)


def chance(scheduler: Scheduler, task: Task, now: float) -> float | None:
    return scheduler.predictor.on_time(task.pool, task, scheduler.tasks, now)


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


# -- over the scheduler's state ----------------------------------------------------------------------------------------


@pytest.mark.spec("HP-ADM-5")
def test_nothing_is_predicted_before_two_tasks_were_measured() -> None:
    """On a cold start the place in the queue is known and the time is null; after two samples both are."""
    scheduler = a_scheduler()
    for n, task_id in enumerate(["a", "b", "c", "d"]):
        submit(scheduler, task_id, now=0.1 * n)
    assert start_in_s(scheduler, "b", 0.3) is None
    scheduler.finished("a", an_outcome(), 1.5)
    assert start_in_s(scheduler, "c", 1.5) is None
    scheduler.finished("b", an_outcome(), 3.0)
    assert start_in_s(scheduler, "d", 3.0) == pytest.approx(1.5)


@pytest.mark.spec("HP-ADM-5")
def test_a_load_that_was_never_measured_is_not_predicted() -> None:
    """How long it takes is unknown, and a guess would be invented."""
    scheduler = a_scheduler(is_ready=False)
    submit(scheduler, "a", now=3.0)
    assert start_in_s(scheduler, "a", 3.0) is None


@pytest.mark.spec("HP-ADM-5")
def test_a_load_that_was_measured_is_part_of_the_wait() -> None:
    """After a loss: the backoff, then the load as it took before, less what of it has passed."""
    scheduler = a_scheduler(is_ready=False)
    scheduler.replica_ready("default-0", slots=4, model_digest=DIGEST, now=8.0)
    measured(scheduler)
    scheduler.replica_lost("default-0", "gone", 10.0)
    submit(scheduler, "a", now=10.0)
    assert start_in_s(scheduler, "a", 10.0) == pytest.approx(0.5 + 8.0)
    scheduler.tick(10.5)
    assert [start_in_s(scheduler, "a", now) for now in (12.5, 18.0, 30.0)] == pytest.approx([6.0, 0.8, 0.8])


@pytest.mark.spec("HP-ADM-5")
def test_waiting_times_add_up_along_the_queue() -> None:
    """Strict tasks of one replica start one service time apart, and the times shrink as the clock runs."""
    scheduler = measured(a_scheduler())
    for task_id in ("a", "b", "c"):
        submit(scheduler, task_id, now=3.0)
    assert [start_in_s(scheduler, task_id, 3.0) for task_id in ("b", "c")] == pytest.approx([1.5, 3.0])
    assert [start_in_s(scheduler, task_id, 4.0) for task_id in ("b", "c")] == pytest.approx([0.5, 2.0])


@pytest.mark.spec("HP-ADM-1")
def test_an_interactive_newcomer_is_not_predicted_behind_batch() -> None:
    """A newcomer's wait counts only those who go before it."""
    scheduler = measured(a_scheduler())
    for task_id in ("running", "b1", "b2"):
        submit(scheduler, task_id, now=3.0, priority=Priority.BATCH)
    urgent = submit(scheduler, "urgent", now=3.0, deadline_ms=1600).task
    assert start_in_s(scheduler, "urgent", 3.0) == pytest.approx(1.5)
    assert start_in_s(scheduler, "b1", 3.0) == pytest.approx(3.0)
    assert urgent.deadline_s == pytest.approx(4.6)


def test_a_task_that_outlives_its_estimate_still_holds_its_slot() -> None:
    """An overdue task is taken to need a tenth more, so that nobody is told "now" while the slot is busy."""
    scheduler = measured(a_scheduler())
    submit(scheduler, "slow", now=3.0)
    submit(scheduler, "next", now=3.0)
    assert start_in_s(scheduler, "next", 100.0) == pytest.approx(0.15)


def test_two_replicas_halve_the_wait() -> None:
    """The forecast plays over all ready replicas of the pool."""
    scheduler = measured(a_scheduler(a_host("3090+3060")))
    for task_id in ("a", "b", "c", "d", "e"):
        submit(scheduler, task_id, now=3.0)
    assert [start_in_s(scheduler, t, 3.0) for t in ("c", "d", "e")] == pytest.approx([1.5, 1.5, 3.0])


@pytest.mark.spec("HP-STR-3")
def test_the_chance_of_a_deadline_falls_as_time_runs_out() -> None:
    """None without a deadline or without samples; else towards 0 while the queue does not move, and with more time
    towards 1."""
    scheduler = a_scheduler()
    early = submit(scheduler, "early", deadline_ms=60_000).task
    assert chance(scheduler, early, 0.0) is None
    scheduler.cancel("early", 0.0)
    scheduler.released("early", 0.0)
    measured(scheduler)
    free = submit(scheduler, "free", now=3.0).task
    assert chance(scheduler, free, 3.0) is None
    told = {"deadline_ms": 3500, "expected_tokens": 20}
    tight = submit(scheduler, "tight", now=3.0, **told).task
    ample = submit(scheduler, "ample", now=3.0, deadline_ms=60_000).task
    assert chance(scheduler, ample, 3.0) == 1.0
    seen = [chance(scheduler, tight, now) or 0.0 for now in (3.0, 4.0, 5.0, 5.5, 6.0)]
    assert seen[0] > 0.5
    assert seen[-1] == 0.0
    assert seen == sorted(seen, reverse=True)
    scheduler.cancel("tight", 6.0)
    assert chance(scheduler, tight, 6.0) is None


@pytest.mark.spec("HP-STR-3")
def test_all_who_wait_have_their_chances_in_one_pass() -> None:
    """The same as each of them alone, and of those only who have a deadline."""
    scheduler = measured(a_scheduler(a_host("3090+3060")))
    tasks = [submit(scheduler, f"t{n}", now=3.0, deadline_ms=[None, 8000, 20_000][n % 3]).task for n in range(9)]
    found = scheduler.predictor.chances(tasks[0].pool, scheduler.tasks, 3.0)
    waiting = [task for task in tasks if task.task_id in task.pool.queue and task.deadline_s is not None]
    assert list(found) == [task.task_id for task in waiting]
    assert [chance(scheduler, task, 3.0) for task in waiting] == list(found.values())


@pytest.mark.spec("HP-STR-3")
def test_a_running_task_needs_only_the_rest_of_its_time() -> None:
    """What it has decoded already is not counted again."""
    scheduler = measured(a_scheduler())
    task = submit(scheduler, "a", now=3.0, deadline_ms=1600, expected_tokens=20).task
    assert chance(scheduler, task, 3.0) == 1.0
    scheduler.progressed("a", 10)
    assert chance(scheduler, task, 4.0) == 1.0
    assert chance(scheduler, task, 4.3) == 0.0  # ten tokens are to come, and there is time for six
    scheduler.progressed("a", 6)
    assert chance(scheduler, task, 4.3) == 1.0


@pytest.mark.spec("HP-STR-3")
def test_a_clients_word_is_taken_for_as_good_as_it_proved() -> None:
    """Who says 20 tokens and gets 40 each time is counted with 40."""
    scheduler = measured(a_scheduler(), tokens=40)
    for n in range(4):
        submit(scheduler, f"word-{n}", now=4.0 + 2.0 * n, expected_tokens=20)
        scheduler.finished(f"word-{n}", an_outcome(tokens_out=40), 5.5 + 2.0 * n)
    task = submit(scheduler, "a", now=20.0, deadline_ms=1200, expected_tokens=20).task
    assert chance(scheduler, task, 20.0) == 0.0


def test_decoding_speed_is_published_once_measured() -> None:
    """Tokens per second of one task, null before the second one."""
    scheduler = a_scheduler()
    assert scheduler.predictor.tokens_per_second(scheduler.pools["default"]) is None
    assert measured(scheduler).predictor.tokens_per_second(scheduler.pools["default"]) == pytest.approx(20.0)


# -- advice ------------------------------------------------------------------------------------------------------------


@pytest.mark.spec("HP-ERR-2")
def test_advice_is_when_the_head_of_the_queue_leaves_it() -> None:
    """That is the soonest that a refused client can find room; it changes with the load and with time."""
    scheduler = measured(a_scheduler())
    pool = scheduler.pools["default"]
    assert scheduler.predictor.advice_ms(pool, scheduler.tasks, 3.0) == ADVICE_MIN_MS
    for task_id in ("a", "b", "c"):
        submit(scheduler, task_id, now=3.0)
    assert scheduler.predictor.advice_ms(pool, scheduler.tasks, 3.0) == 1500
    assert scheduler.predictor.advice_ms(pool, scheduler.tasks, 3.5) == 1000


@pytest.mark.spec("HP-ERR-2")
def test_advice_without_a_queue_is_when_a_slot_gets_free() -> None:
    """A pool with `queue.capacity: 0` has no head to wait for, and its load still decides."""
    scheduler = measured(a_scheduler(queue_capacity=0))
    pool = scheduler.pools["default"]
    assert scheduler.predictor.advice_ms(pool, scheduler.tasks, 3.0) == ADVICE_MIN_MS
    submit(scheduler, "a", now=3.0, expected_tokens=200)
    assert scheduler.predictor.advice_ms(pool, scheduler.tasks, 3.0) == 10_500


@pytest.mark.spec("HP-ERR-2")
def test_advice_before_anything_was_measured_grows_with_the_queue() -> None:
    """A guess per task ahead is no prediction, but it is no constant either."""
    scheduler = a_scheduler(slots=1)
    pool = scheduler.pools["default"]
    submit(scheduler, "running")
    advice = []
    for n in range(3):
        submit(scheduler, f"t{n}")
        advice.append(scheduler.predictor.advice_ms(pool, scheduler.tasks, 0.0))
    assert advice == sorted(set(advice))


@pytest.mark.spec("HP-ERR-2")
def test_advice_has_bounds() -> None:
    """A client is never sent away for longer than five minutes."""
    scheduler = measured(a_scheduler(ctx=10**9, max_tokens=10**8))
    for task_id in ("a", "b"):
        submit(scheduler, task_id, now=3.0, expected_tokens=10**7)
    pool = scheduler.pools["default"]
    assert scheduler.predictor.advice_ms(pool, scheduler.tasks, 3.0) == ADVICE_MAX_MS


@pytest.mark.spec("HP-ERR-2")
def test_advice_for_a_pool_that_loads_follows_the_load() -> None:
    """A load may take as long again as it has taken so far; in backoff the restart is known to the moment."""
    scheduler = a_scheduler(is_ready=False)
    pool, advice = scheduler.pools["default"], scheduler.predictor.ready_advice_ms
    assert [advice(pool, now) for now in (0.0, 2.0, 7.0)] == [ADVICE_MIN_MS, 2000, 7000]
    scheduler.replica_lost("default-0", "no memory", 10.0)
    assert advice(pool, 10.1) == 400
    scheduler.tick(10.5)
    assert advice(pool, 12.0) == 1500
    assert advice(pool, 1e6) == ADVICE_MAX_MS


@PROPERTY
@given(lengths=st.lists(st.integers(1, 200), min_size=3, max_size=7), slots=st.integers(1, 3), is_shared=st.booleans())
def test_predictions_come_true_when_tasks_take_what_they_said(lengths: list[int], slots: int, is_shared: bool) -> None:
    """With a constant speed and honest `expected_tokens` every task starts when it was told at its admission."""
    scheduler = measured(a_scheduler(slots=slots))
    determinism = SHARED if is_shared else Determinism.STRICT
    told = {}
    for n, length in enumerate(lengths):
        task = submit(scheduler, f"t{n}", now=3.0, expected_tokens=length, determinism=determinism).task
        waits = task.started_s is None
        told[task.task_id] = 3.0 + (start_in_s(scheduler, task.task_id, 3.0) or math.nan) if waits else 3.0
    while running := [t for t in scheduler.tasks.values() if t.lease is not None]:
        ends = {t.task_id: (t.started_s or 0) + 0.5 + (t.request.expected_tokens or 0) * 0.05 for t in running}
        first = min(ends, key=lambda task_id: ends[task_id])
        length = scheduler.tasks[first].request.expected_tokens or 0
        scheduler.finished(first, an_outcome(tokens_out=length, decode_ms=length * 50), ends[first])
    assert {t: scheduler.tasks[t].started_s for t in told} == {t: pytest.approx(told[t]) for t in told}


# -- loads -------------------------------------------------------------------------------------------------------------


@pytest.mark.spec("HP-ADM-5")
def test_nothing_is_predicted_of_a_load_that_was_never_measured() -> None:
    """A cold start is null, also where the model's speed is known from another device."""
    scheduler = a_scheduler(is_ready=False)
    task = submit(scheduler, "t").task
    assert task_start_in_s(scheduler, task, 1.0) is None
    assert task.predicted_s is None


@pytest.mark.spec("HP-ADM-5", "HP-PLC-8")
def test_a_task_that_waits_for_a_swap_is_told_of_it() -> None:
    """The wait for others to leave is in it, from the moment that they were asked to; then the load alone."""
    scheduler = swapping()
    for n in range(2):
        submit(scheduler, f"a-again{n}", pool_id="a", now=100.0)
    first, second = (scheduler.tasks[f"a-again{n}"] for n in range(2))
    assert scheduler.replicas["a-0"].is_promised
    # `a` was loaded into an empty card: its swap was not measured.
    assert task_start_in_s(scheduler, first, 100.0) is None
    scheduler.replica_unloaded("b-0", 102.0)
    assert task_start_in_s(scheduler, first, 103.0) == pytest.approx(3.0)
    assert task_start_in_s(scheduler, second, 103.0) == pytest.approx(5.0)
    ready(scheduler, "a-0", 107.0)
    for n in range(2):
        scheduler.finished(f"a-again{n}", an_outcome(decode_ms=2000), 110.0 + n)
    back = submit(scheduler, "b-again", pool_id="b", now=120.0).task
    assert scheduler.replicas["b-0"].is_promised
    assert task_start_in_s(scheduler, back, 120.0) == pytest.approx(10.0)
    assert back.predicted_s == pytest.approx(130.0)
    assert task_start_in_s(scheduler, back, 125.0) == pytest.approx(5.0)


def test_a_load_that_takes_longer_than_ever_is_expected_to_take_a_little_more() -> None:
    """It is never told to be over."""
    scheduler = swapping()
    task = submit(scheduler, "t", pool_id="a", now=100.0).task
    scheduler.replica_unloaded("b-0", 101.0)
    assert task_start_in_s(scheduler, task, 500.0) == pytest.approx(4.0 * OVERDUE_SHARE)


@pytest.mark.spec("HP-PLC-7")
def test_a_restart_is_the_backoff_and_the_load() -> None:
    """Of a model that has been loaded before."""
    scheduler = swapping()
    for n in range(2):
        submit(scheduler, f"t{n}", pool_id="b", now=100.0)
    scheduler.replica_lost("b-0", "gone", 101.0)
    waits = scheduler.tasks["t1"]
    assert task_start_in_s(scheduler, waits, 101.0) == pytest.approx(0.5 + 8.0)


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


def two_cards(fast_s: float, slow_s: float | None, **spec: Any) -> Scheduler:
    scheduler = a_scheduler(a_host("3090+3060", **spec))
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
    starts = [start_in_s(scheduler, task_id, 0.0) for task_id in scheduler.pools["default"].queue]
    assert starts == pytest.approx([2.0, 3.0, 4.0, 6.0, 6.0, 8.0])


@pytest.mark.spec("HP-PLC-3")
@settings(PROPERTY, max_examples=20)
@given(seed=st.integers(0, 10**6), strict=st.sampled_from([0.0, 0.5, 1.0]))
def test_who_is_far_back_starts_at_the_pace_of_all(seed: int, strict: float) -> None:
    """Four times as many wait as are played one by one; the last is foretold within a tenth of what playing all gives,
    and what is foretold rises along the queue."""
    dice, scheduler = random.Random(seed), two_cards(2.0, 3.0, queue_capacity=1000)
    for n in range(4 * EXACT_MAX):
        submit(
            scheduler,
            f"t{n}",
            priority=dice.choice([Priority.INTERACTIVE, Priority.BATCH]),
            determinism=Determinism.STRICT if dice.random() < strict else SHARED,
            max_tokens=dice.choice([2, 10, 20]),
        )
    waiting = list(scheduler.pools["default"].queue)
    found = [start_in_s(scheduler, task_id, 0.0) or 0.0 for task_id in waiting]
    assert found == sorted(found)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prediction, "EXACT_MAX", 10**6)
        scheduler.pools["default"].courses.clear()
        true_s = start_in_s(scheduler, waiting[-1], 0.0) or 0.0
        assert found[: EXACT_MAX // 2] == pytest.approx(
            [start_in_s(scheduler, task_id, 0.0) or 0.0 for task_id in waiting[: EXACT_MAX // 2]]
        )
    assert found[-1] == pytest.approx(true_s, rel=0.1)


@settings(PROPERTY, max_examples=30)
@given(seed=st.integers(0, 10**6))
def test_a_course_that_goes_on_is_the_same_as_a_new_one(seed: int) -> None:
    """Whatever happened since the queue was played, what is foretold is what playing it anew would give."""
    dice, scheduler = random.Random(seed), two_cards(2.0, 3.0, queue_capacity=1000)
    pool, now, running = scheduler.pools["default"], 0.0, list[str]()
    for n in range(60):
        running += [effect.task_id for effect in scheduler.take_effects() if isinstance(effect, Start)]
        match dice.choice(["come", "come", "come", "leave", "end", "wait"]):
            case "come":
                submit(
                    scheduler,
                    f"t{n}",
                    now=now,
                    priority=dice.choice([Priority.INTERACTIVE, Priority.BATCH]),
                    determinism=dice.choice(list(Determinism)),
                    max_tokens=dice.choice([2, 20]),
                )
            case "leave" if len(pool.queue):
                scheduler.cancel(pool.queue.at(dice.randrange(len(pool.queue))), now)
            case "end" if running:
                scheduler.finished(running.pop(), an_outcome(tokens_out=dice.randrange(1, 30)), now)
            case _:
                now += dice.choice([0.01, 1.0])
        waiting = list(pool.queue)
        found = [start_in_s(scheduler, task_id, now) for task_id in waiting]
        pool.courses.clear()
        anew = [start_in_s(scheduler, task_id, now) for task_id in waiting]
        assert found == pytest.approx(anew, abs=0.1)


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
