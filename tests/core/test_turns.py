"""Turns of those who found the queue full: each a place of its own, kept by who comes early, forgotten in time."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_orch.core import turns
from llama_orch.core.prediction import ADVICE_MAX_MS
from llama_orch.core.scheduler import Scheduler
from llama_orch.core.turns import Turns
from llama_orch.errors import LlorchError
from llama_orch.testing.builders import a_scheduler, an_outcome, submit

pytestmark = pytest.mark.spec("HP-ERR-2")
PROPERTY = settings(max_examples=200, derandomize=True, deadline=None, database=None)


def each_second(ahead: int) -> float:
    """A queue that one task leaves each second."""
    return 1.0 + ahead


def full(*, capacity: int = 2, **pool: object) -> Scheduler:
    """One slot that is taken for 1.5 s by a task of known length, and `capacity` tasks that wait, at time 3.0."""
    scheduler = a_scheduler(slots=1, queue_capacity=capacity, **pool)
    for n in range(2):
        submit(scheduler, f"sample-{n}", now=1.5 * n)
        scheduler.finished(f"sample-{n}", an_outcome(tokens_out=20), 1.5 * (n + 1))
    for n in range(capacity + 1):
        submit(scheduler, f"t{n}", now=3.0)
    return scheduler


def refused_ms(scheduler: Scheduler, task_id: str, now: float, **fields: object) -> int:
    with pytest.raises(LlorchError) as refused:
        submit(scheduler, task_id, now=now, **fields)
    assert refused.value.retry_after_ms is not None
    return refused.value.retry_after_ms


def test_each_gets_the_next_place() -> None:
    """Callers that are sent away at the same moment come one after the other."""
    line = Turns()
    assert [line.give(str(n), 10.0, each_second) for n in range(4)] == [1.0, 2.0, 3.0, 4.0]


def test_a_turn_that_has_passed_is_forgotten() -> None:
    """Its place is somebody else's again, whether its owner came or not."""
    line = Turns()
    for n in range(3):
        line.give(str(n), 10.0, each_second)
    assert line.give("late", 12.5, each_second) == 2.0  # behind the one that is still to come
    assert len(line) == 2


def test_who_comes_early_keeps_its_turn() -> None:
    """An impatient caller neither loses its place nor pushes the others back, however often it asks."""
    line = Turns()
    line.give("other", 10.0, each_second)
    line.give("mine", 10.0, each_second)
    assert [line.give("mine", 10.0 + n / 10, each_second) for n in range(5)] == pytest.approx([2.0, 1.9, 1.8, 1.7, 1.6])
    assert line.give("next", 10.5, each_second) == 3.0


def test_a_turn_moves_up_where_the_queue_drains_faster() -> None:
    """Canceled tasks bring everybody forward who asks."""
    line = Turns()
    for n in range(5):
        line.give(str(n), 10.0, lambda ahead: 10.0 * (1 + ahead))
    assert line.give("4", 11.0, each_second) == 5.0


def test_who_found_room_has_no_turn() -> None:
    line = Turns()
    line.give("a", 10.0, each_second)
    line.came("a")
    line.came("never sent away")
    assert line.give("b", 10.0, each_second) == 1.0


def test_turns_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the limit nobody is remembered, and all are told the same."""
    monkeypatch.setattr(turns, "TURNS_MAX", 3)
    line = Turns()
    assert [line.give(str(n), 0.0, each_second) for n in range(6)] == [1.0, 2.0, 3.0, 4.0, 4.0, 4.0]
    assert len(line) == 3


@given(st.lists(st.tuples(st.integers(0, 9), st.floats(0, 3)), max_size=40), st.floats(0.1, 5))
@PROPERTY
def test_no_two_have_the_same_turn(asks: list[tuple[int, float]], interval_s: float) -> None:
    """At a steady drain, whoever asks and whenever: as many turns as callers, none in the past, none twice."""
    line, now, told = Turns(), 0.0, {}
    for caller, pause_s in asks:
        now += pause_s
        wait_s = line.give(str(caller), now, lambda ahead: interval_s * (1 + ahead))
        assert wait_s > 0
        told = {one: at_s for one, at_s in told.items() if at_s > now}
        told[caller] = now + wait_s
    assert len(line) == len(told)


# -- the scheduler's refusals ----------------------------------------------------------------------------------------


def test_refusals_follow_the_predicted_drain() -> None:
    """The first is told when the head of the queue will start, the next when the one behind it will, and those beyond
    the queue come at the pace of the tasks in it."""
    scheduler = full()
    waiting = [scheduler.tasks[task_id] for task_id in scheduler.pools["default"].queue]
    starts = [scheduler.predictor.outlook(task, scheduler.tasks, 3.0).start_in_s for task in waiting]
    assert starts == [1.5, 3.0]
    assert [refused_ms(scheduler, f"r{n}", 3.0) for n in range(4)] == [1500, 3000, 4500, 6000]


def test_a_queue_of_longer_tasks_means_longer_waits() -> None:
    """What waits and what is told both come from the same forecast."""
    short, long = full(), full()
    for task_id in ("t1", "t2"):
        long.cancel(task_id, 3.0)
    for n in (1, 2):
        submit(long, f"long-{n}", now=3.0, expected_tokens=200)
    told = [[refused_ms(one, f"r{n}", 3.0) for n in range(3)] for one in (short, long)]
    assert told[0] == [1500, 3000, 4500]
    assert told[1] == [1500, 12_000, 22_500]


def test_an_admitted_task_gives_its_turn_back() -> None:
    """Who came early and found room all the same is not waited for."""
    scheduler = full()
    assert [refused_ms(scheduler, task_id, 3.0) for task_id in ("a", "b")] == [1500, 3000]
    scheduler.cancel("t2", 3.0)
    submit(scheduler, "b", now=3.0)
    assert refused_ms(scheduler, "c", 3.0) == 3000


def test_a_dropped_task_is_given_a_turn_too() -> None:
    """Under drop-lru the one that had to leave comes again when there is room, and not at once to push out another."""
    scheduler = full(full_policy="drop-lru")
    for n in range(3):
        submit(scheduler, f"new-{n}", now=3.0)
    errors = [task.error for task in scheduler.tasks.values() if task.error is not None]
    assert [error.retry_after_ms for error in errors] == [1500, 3000, 4500]


def test_turns_have_the_bounds_of_any_advice() -> None:
    """Nobody is sent away for longer than five minutes, however many there are."""
    scheduler = full()
    assert [refused_ms(scheduler, f"r{n}", 3.0) for n in range(250)][-1] == ADVICE_MAX_MS


@pytest.mark.spec("HP-ADM-7")
def test_a_deadline_is_refused_until_it_can_be_met() -> None:
    """The wait ends where the predicted start would be within the time that a repeat has again."""
    scheduler = full(capacity=8)
    wait_ms = refused_ms(scheduler, "hurried", 3.0, deadline_ms=10_000)
    assert wait_ms == 9 * 1500 - 10_000
    for n in range(2):
        scheduler.finished(f"t{n}", an_outcome(tokens_out=20), 4.5 + 1.5 * n)
    verdict = submit(scheduler, "hurried", now=3.0 + wait_ms / 1000 + 0.001, deadline_ms=10_000)
    assert verdict.task.predicted_s == pytest.approx(3.0 + 9 * 1.5)
