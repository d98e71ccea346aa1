"""Predictions: honest when nothing is known, and equal to playing the queue forward when something is."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_orch.contract.models import Determinism, Priority
from llama_orch.core.estimate import Average, Lane, Lengths, Speeds, forecast, on_time_probability
from llama_orch.core.prediction import ADVICE_MAX_MS, ADVICE_MIN_MS
from llama_orch.core.scheduler import Scheduler
from llama_orch.core.task import Task
from llama_orch.testing.builders import DIGEST, a_host, a_scheduler, an_outcome, submit

PROPERTY = settings(max_examples=200, derandomize=True, deadline=None, database=None)
SHARED = Determinism.BEST_EFFORT


def measured(scheduler: Scheduler, *, tokens: int = 20) -> Scheduler:
    """After two tasks that took 1.5 s each, 1 s of it for `tokens` tokens, at time 3.0."""
    for n in range(2):
        submit(scheduler, f"sample-{n}", now=1.5 * n)
        scheduler.finished(f"sample-{n}", an_outcome(tokens_out=tokens), 1.5 * (n + 1))
    scheduler.take_effects()
    return scheduler


def start_in_s(scheduler: Scheduler, task_id: str, now: float) -> float | None:
    pool = scheduler.pools["default"]
    return scheduler.predictor.outlooks(pool, scheduler.tasks, now)[task_id].start_in_s


def chance(scheduler: Scheduler, task: Task, start_in_s: float | None, now: float) -> float | None:
    return scheduler.predictor.on_time(task.pool, task, start_in_s, now)


# -- averages and speeds -----------------------------------------------------------------------------------------------


@PROPERTY
@given(values=st.lists(st.floats(0, 1000), min_size=1, max_size=5))
def test_the_first_few_samples_count_alike(values: list[float]) -> None:
    """Up to five samples the averages are the plain mean and variance."""
    average = Average()
    for value in values:
        average.add(value)
    assert average.mean == pytest.approx(statistics.fmean(values), abs=1e-6)
    assert average.variance == pytest.approx(statistics.pvariance(values), rel=1e-6, abs=1e-6)


@PROPERTY
@given(values=st.lists(st.floats(0, 1000), min_size=1, max_size=40))
def test_an_average_stays_among_its_samples(values: list[float]) -> None:
    """The mean lies between the smallest and the largest sample, and the variance is never negative."""
    average = Average()
    for value in values:
        average.add(value)
    assert min(values) - 1e-9 <= average.mean <= max(values) + 1e-9
    assert average.variance >= 0


def test_an_average_follows_a_change() -> None:
    """After many samples of a new value hardly anything is left of the old one."""
    average = Average()
    for value in [10.0] * 100 + [1.0] * 150:
        average.add(value)
    assert average.mean == pytest.approx(1.0, abs=0.2)


@pytest.mark.spec("HP-PLC-3")
def test_service_time_is_overhead_prompt_and_tokens() -> None:
    """Each part is measured by itself and adds up for tasks of other lengths."""
    speeds = Speeds()
    assert not speeds.is_known
    for _ in range(2):
        speeds.learn(service_s=1.5, decode_s=1.0, tokens_out=20, prefill_s=0.4, tokens_read=100)
    assert speeds.is_known
    assert speeds.service_s(1000, 100) == pytest.approx(0.1 + 1000 * 0.004 + 100 * 0.05)
    assert speeds.deviation_s(100, 0.0) == pytest.approx(0.0)


@pytest.mark.spec("HP-PLC-3")
def test_the_expected_length_is_the_clients_word_or_experience() -> None:
    """The client's guess replaces the usual length, and `max_tokens` bounds either, and each of the usual ones."""
    lengths = Lengths()
    for tokens in (10, 30):
        lengths.add(tokens)
    assert [lengths.expected(256, None), lengths.expected(20, None), lengths.expected(5, None)] == [20, 15, 5]
    assert [lengths.expected(256, 100), lengths.expected(10, 100)] == [100, 10]


@pytest.mark.spec("HP-PLC-3")
def test_what_is_left_is_what_longer_answers_had_more() -> None:
    """Those that ended earlier say nothing any more; beyond all experience a tenth more is expected."""
    lengths = Lengths()
    for tokens in (10, 30, 50):
        lengths.add(tokens)
    assert [lengths.left(n, 256, None) for n in (5, 20, 40, 60)] == [25, 20, 10, 6]
    assert [lengths.left(40, 100, 80), lengths.left(80, 100, 80), lengths.left(99, 100, 80)] == [40, 8, 1]


def test_a_known_length_leaves_less_doubt() -> None:
    """The spread of lengths counts only where the client has not said how long its answer is."""
    speeds = Speeds()
    for tokens in (10, 50):
        speeds.learn(service_s=tokens * 0.1, decode_s=tokens * 0.1, tokens_out=tokens)
    assert speeds.deviation_s(30, 400.0) == pytest.approx(20 * 0.1)
    assert speeds.deviation_s(30, 0.0) == pytest.approx(0.0, abs=1e-9)


def test_a_task_without_a_token_says_nothing_of_the_speed() -> None:
    """It counts for overheads, and divides nothing by zero."""
    speeds = Speeds()
    speeds.learn(service_s=0.3, decode_s=0.0, tokens_out=0)
    assert speeds.is_known
    assert speeds.service_s(0, 0) == pytest.approx(0.3)
    assert speeds.token_s.samples == 0


# -- the forecast ------------------------------------------------------------------------------------------------------

LANES = st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=3), min_size=1, max_size=3)
WAITING = st.lists(st.tuples(st.booleans(), st.integers(0, 5)), max_size=8)


def played_forward(lanes: list[list[int]], waiting: list[tuple[bool, int]]) -> list[int]:
    """Second by second: while the head finds a place it takes the one that has been free for the longest time."""
    lanes, queue, starts, now = [list(lane) for lane in lanes], list(waiting), [], 0
    while queue:
        exclusive, service = queue[0]
        free_since = max if exclusive else min
        able = [lane for lane in lanes if free_since(lane) <= now]
        if not able:
            now += 1
            continue
        lane = min(able, key=free_since)
        for slot in range(len(lane)) if exclusive else [lane.index(min(lane))]:
            lane[slot] = now + service
        starts.append(now)
        queue.pop(0)
    return starts


def forecast_of(lanes: list[list[int]], waiting: list[tuple[bool, int]]) -> list[float]:
    tasks = [(str(n), exclusive, [float(service)] * len(lanes)) for n, (exclusive, service) in enumerate(waiting)]
    starts = forecast([Lane([float(free) for free in lane], n) for n, lane in enumerate(lanes)], tasks)
    return [starts[task_id] for task_id, _, _ in tasks]


@pytest.mark.spec("HP-ADM-5", "HP-PLC-3")
@PROPERTY
@given(lanes=LANES, waiting=WAITING)
def test_the_forecast_is_what_playing_forward_gives(lanes: list[list[int]], waiting: list[tuple[bool, int]]) -> None:
    """Predicted starts are those of a simulation in steps of one second."""
    assert forecast_of(lanes, waiting) == played_forward(lanes, waiting)


@pytest.mark.spec("HP-ADM-2")
@PROPERTY
@given(lanes=LANES, waiting=WAITING)
def test_the_forecast_lets_nobody_overtake(lanes: list[list[int]], waiting: list[tuple[bool, int]]) -> None:
    """Starts follow the order of service, and none is in the past."""
    starts = forecast_of(lanes, waiting)
    assert starts == sorted(starts)
    assert all(start >= 0 for start in starts)


@pytest.mark.spec("HP-DET-1")
def test_an_exclusive_task_waits_for_every_slot_and_holds_up_who_follows() -> None:
    """Two slots, free at 1 and 4: the exclusive task starts at 4, and the next one only after it."""
    waiting = [("strict", True, [2.0, 2.0]), ("shared", False, [1.0, 1.0])]
    assert forecast([Lane([1.0, 4.0])], waiting) == {"strict": 4.0, "shared": 6.0}
    assert forecast([Lane([1.0, 4.0])], waiting[::-1]) == {"shared": 1.0, "strict": 4.0}
    assert forecast([Lane([1.0, 4.0]), Lane([3.0], 1)], waiting) == {"strict": 3.0, "shared": 3.0}


# -- chances -----------------------------------------------------------------------------------------------------------

SECONDS = st.floats(0, 1e4)


@pytest.mark.spec("HP-STR-3")
@PROPERTY
@given(left=SECONDS, more=SECONDS, mean=SECONDS, deviation=SECONDS)
def test_more_time_never_lowers_the_chance(left: float, more: float, mean: float, deviation: float) -> None:
    """The chance is a probability, grows with the time left and falls with the work left."""
    chance = on_time_probability(left, mean, deviation)
    assert 0.0 <= chance <= 1.0
    assert on_time_probability(left + more, mean, deviation) >= chance
    assert on_time_probability(left, mean + more, deviation) <= chance


def test_chances_that_are_known() -> None:
    """Half where the time left is the mean, 0.841 one deviation above it, certainty without any spread."""
    assert on_time_probability(5.0, 5.0, 1.0) == pytest.approx(0.5)
    assert on_time_probability(6.0, 5.0, 1.0) == pytest.approx(0.8413, abs=1e-4)
    assert on_time_probability(5.0, 5.0, 0.0) == 1.0
    assert on_time_probability(4.9, 5.0, 0.0) == 0.0


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


@pytest.mark.spec("HP-ADM-5", "HP-PLC-3")
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


@pytest.mark.spec("HP-ADM-5", "HP-PLC-3")
def test_waiting_times_add_up_along_the_queue() -> None:
    """Strict tasks of one replica start one service time apart, and the times shrink as the clock runs."""
    scheduler = measured(a_scheduler())
    for task_id in ("a", "b", "c"):
        submit(scheduler, task_id, now=3.0)
    assert [start_in_s(scheduler, task_id, 3.0) for task_id in ("b", "c")] == pytest.approx([1.5, 3.0])
    assert [start_in_s(scheduler, task_id, 4.0) for task_id in ("b", "c")] == pytest.approx([0.5, 2.0])


@pytest.mark.spec("HP-ADM-1", "HP-PLC-3")
def test_an_interactive_newcomer_is_not_predicted_behind_batch() -> None:
    """A newcomer's wait counts only those who go before it."""
    scheduler = measured(a_scheduler())
    for task_id in ("running", "b1", "b2"):
        submit(scheduler, task_id, now=3.0, priority=Priority.BATCH)
    urgent = submit(scheduler, "urgent", now=3.0, deadline_ms=1600).task
    assert start_in_s(scheduler, "urgent", 3.0) == pytest.approx(1.5)
    assert start_in_s(scheduler, "b1", 3.0) == pytest.approx(3.0)
    assert urgent.deadline_s == pytest.approx(4.6)


@pytest.mark.spec("HP-PLC-3")
def test_a_task_that_outlives_its_estimate_still_holds_its_slot() -> None:
    """An overdue task is taken to need a tenth more, so that nobody is told "now" while the slot is busy."""
    scheduler = measured(a_scheduler())
    submit(scheduler, "slow", now=3.0)
    submit(scheduler, "next", now=3.0)
    assert start_in_s(scheduler, "next", 100.0) == pytest.approx(0.15)


@pytest.mark.spec("HP-PLC-3")
def test_two_replicas_halve_the_wait() -> None:
    """The forecast plays over all ready replicas of the pool."""
    scheduler = measured(a_scheduler(a_host("3090+3060")))
    for task_id in ("a", "b", "c", "d", "e"):
        submit(scheduler, task_id, now=3.0)
    assert [start_in_s(scheduler, t, 3.0) for t in ("c", "d", "e")] == pytest.approx([1.5, 1.5, 3.0])


@pytest.mark.spec("HP-STR-3")
def test_the_chance_of_a_deadline_falls_as_time_runs_out() -> None:
    """None without a deadline or without samples; else from 1 towards 0 while the queue does not move."""
    scheduler = a_scheduler()
    early = submit(scheduler, "early", deadline_ms=60_000).task
    assert chance(scheduler, early, None, 0.0) is None
    scheduler.cancel("early", 0.0)
    scheduler.released("early", 0.0)
    measured(scheduler)
    free = submit(scheduler, "free", now=3.0).task
    assert chance(scheduler, free, None, 3.0) is None
    tight = submit(scheduler, "tight", now=3.0, deadline_ms=4000).task
    assert chance(scheduler, tight, None, 3.0) is None  # its start is not known
    assert chance(scheduler, tight, 1.5, 3.0) == 1.0
    assert chance(scheduler, tight, 3.0, 3.0) == 0.0


@pytest.mark.spec("HP-STR-3")
def test_a_running_task_needs_only_the_rest_of_its_time() -> None:
    """What it has decoded already is not counted again."""
    scheduler = measured(a_scheduler())
    task = submit(scheduler, "a", now=3.0, deadline_ms=1600).task
    assert chance(scheduler, task, None, 3.0) == 1.0
    assert chance(scheduler, task, None, 4.0) == 1.0
    assert chance(scheduler, task, None, 4.7) == 0.0  # the deadline has passed


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


@pytest.mark.spec("HP-PLC-3")
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
