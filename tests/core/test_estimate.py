"""The arithmetic of predictions: averages and speeds, the queue played forward, chances. See test_prediction.py."""

from __future__ import annotations

import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_orch.core.course import Course
from llama_orch.core.estimate import OPTIONS_MAX, Average, Lane, Lengths, Speeds

PROPERTY = settings(max_examples=200, derandomize=True, deadline=None, database=None)


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
    assert speeds.deviation == pytest.approx(0.0)


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


@pytest.mark.spec("HP-STR-3")
def test_what_an_answer_may_still_get() -> None:
    """What the latest got beyond what it has, and something shorter and longer than all of them; never over the limit.
    Thinned evenly where there are many."""
    lengths = Lengths()
    assert lengths.options(0, 256, None) == [0.0]
    for tokens in (10, 30, 20):
        lengths.add(tokens)
    assert lengths.options(0, 256, None) == [5, 10, 20, 30, 45]
    assert lengths.options(15, 25, None) == [5, 10, 10]
    assert lengths.options(50, 256, None) == [5.0]  # beyond all experience: a tenth more
    for tokens in range(1, 257):
        lengths.add(tokens)
    found = lengths.options(0, 1000, None)
    assert len(found) == OPTIONS_MAX
    assert found == sorted(found)
    assert sum(found) / len(found) == pytest.approx(128.5, abs=2)


@pytest.mark.spec("HP-STR-3")
def test_a_told_length_is_as_sure_as_it_proved_to_be() -> None:
    """Exact until something else was seen; then off by as much as before, either way."""
    lengths = Lengths()
    assert lengths.options(0, 256, 100) == [100]
    for tokens in (50, 150):
        lengths.add(tokens, expected_tokens=100)
    assert lengths.options(0, 256, 40) == [20, 60]
    assert lengths.options(30, 50, 40) == [20]
    assert lengths.options(80, 256, 40) == [4.0]


def test_the_deviation_of_speeds_is_relative() -> None:
    """0.05 and 0.15 s per token: half of the mean."""
    speeds = Speeds()
    assert speeds.deviation == 0.0
    for token_s in (0.05, 0.15):
        speeds.learn(service_s=20 * token_s, decode_s=20 * token_s, tokens_out=20)
    assert speeds.deviation == pytest.approx(0.5)


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


def forecast(lanes: list[list[float]], waiting: list[tuple[str, bool, list[float]]]) -> dict[str, float]:
    """Starts by task id of who is played forward over the lanes, which get free then."""
    course = Course("key", 0.0, [], [Lane(lane, number) for number, lane in enumerate(lanes)])
    for task_id, exclusive, services_s in waiting:
        expected = course.next_start_s(exclusive=exclusive)
        course.play(task_id, services_s, exclusive=exclusive)
        assert course.starts_s[task_id] == expected
    return course.starts_s


def forecast_of(lanes: list[list[int]], waiting: list[tuple[bool, int]]) -> list[float]:
    tasks = [(str(n), exclusive, [float(service)] * len(lanes)) for n, (exclusive, service) in enumerate(waiting)]
    starts = forecast([[float(free) for free in lane] for lane in lanes], tasks)
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
    assert forecast([[1.0, 4.0]], waiting) == {"strict": 4.0, "shared": 6.0}
    assert forecast([[1.0, 4.0]], waiting[::-1]) == {"shared": 1.0, "strict": 4.0}
    assert forecast([[1.0, 4.0], [3.0]], waiting) == {"strict": 3.0, "shared": 3.0}
