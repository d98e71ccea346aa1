"""Chances of deadlines: exact where nothing varies, and as a plain simulation with dice has them where much does."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_orch.core.chance import SCENARIOS, Holder, Slot, Waiter, Work, chances, own_chance

pytestmark = pytest.mark.spec("HP-STR-3")
PROPERTY = settings(max_examples=30, derandomize=True, deadline=None, database=None)

SECONDS = st.floats(0.0, 100.0)
WORKS = st.builds(
    Work, SECONDS, st.lists(SECONDS, min_size=1, max_size=8).map(sorted), st.sampled_from([0.0, 0.1, 0.5])
)
LANES = st.lists(
    st.lists(SECONDS | st.builds(Holder, st.integers(1, 99), WORKS), min_size=1, max_size=4), min_size=1, max_size=3
)
EXACTLY_2_S = Work(0.5, [1.5])
EXPONENTIAL = [10 * random.Random(n).expovariate(1.0) for n in range(64)]


def waiters(draw: st.DrawFn, lanes: int) -> list[Waiter]:
    count = draw(st.integers(1, 6))
    return [
        Waiter(100 + n, draw(st.booleans()), [draw(WORKS) for _ in range(lanes)], draw(st.none() | SECONDS))
        for n in range(count)
    ]


@PROPERTY
@given(data=st.data(), lanes=LANES, more_s=SECONDS)
def test_a_chance_is_one_and_grows_with_the_time(data: st.DataObject, lanes: list[list[Slot]], more_s: float) -> None:
    """Between 0 and 1, 1 without a deadline, and not less for who has more time, whether it waits or runs."""
    waiting = data.draw(st.composite(waiters)(len(lanes)))
    found = chances(lanes, waiting)
    assert all(0.0 <= chance <= 1.0 for chance in found)
    last = waiting[-1]
    if last.left_s is None:
        assert found[-1] == 1.0
        return
    patient = Waiter(last.number, last.is_exclusive, last.works, last.left_s + more_s)
    assert chances(lanes, [*waiting[:-1], patient])[-1] >= found[-1]
    runs = [own_chance(Holder(7, last.works[0], left_s)) for left_s in (last.left_s, last.left_s + more_s, None)]
    assert runs == sorted(runs)
    assert runs[-1] == 1.0


@PROPERTY
@given(data=st.data(), lane=LANES.map(lambda lanes: lanes[0]))
def test_who_is_behind_takes_nothing_away(data: st.DataObject, lane: list[Slot]) -> None:
    """On one replica nobody is overtaken, so that a chance depends on those ahead and on nobody else."""
    waiting = data.draw(st.composite(waiters)(1))
    count = data.draw(st.integers(1, len(waiting)))
    assert chances([lane], waiting[:count]) == chances([lane], waiting)[:count]


def test_a_task_waits_for_the_faster_card_where_that_pays() -> None:
    """As placement does: free now but 10 s long, against free in 3 s and 2 s long; with many behind, it goes."""
    works = [Work(0.0, [10.0]), Work(0.0, [2.0])]
    one = Waiter(1, False, works, 6.0)
    assert chances([[0.0], [3.0]], [one]) == [1.0]
    behind = [Waiter(2 + n, False, works) for n in range(6)]
    assert chances([[0.0], [3.0]], [one, *behind])[0] == 0.0


def test_what_does_not_vary_is_certain() -> None:
    """Two slots, free at 1 and 3 s, tasks of 2 s: the shared ones end at 3, 5 and 5 s, an exclusive one at 5 s."""
    lanes = [[1.0, 3.0]]

    def ends(exclusive: Sequence[bool], left_s: float) -> list[float]:
        return chances(
            lanes,
            [
                Waiter(n, one, [EXACTLY_2_S], left_s if n == len(exclusive) - 1 else None)
                for n, one in enumerate(exclusive)
            ],
        )

    for exclusive, end_s in (
        ([False], 3.0),
        ([False, False], 5.0),
        ([False] * 3, 5.0),
        ([True], 5.0),
        ([True, True], 7.0),
    ):
        assert ends(exclusive, end_s - 0.01)[-1] == 0.0
        assert ends(exclusive, end_s)[-1] == 1.0


def test_who_is_too_late_leaves() -> None:
    """A task that cannot start before its deadline holds up nobody afterwards, and one that runs is ended then."""
    hopeless = Waiter(1, False, [Work(0.0, [100.0])], 1.0)
    assert chances([[4.0]], [hopeless, Waiter(2, False, [EXACTLY_2_S], 6.0)]) == [0.0, 1.0]
    cut = Holder(1, Work(0.0, [100.0]), 3.0)
    assert chances([[cut]], [Waiter(2, False, [EXACTLY_2_S], 5.0)]) == [1.0]


def rolled(dice: random.Random, slots: int, ahead: int, left_s: float) -> bool:
    """Whether a task behind so many is on time, once, with dice: exponential needs, on slots that are all held."""
    free = [dice.choice(EXPONENTIAL) for _ in range(slots)]
    for _ in range(ahead):
        free[free.index(min(free))] += dice.choice(EXPONENTIAL)
    return min(free) + dice.choice(EXPONENTIAL) <= left_s


@pytest.mark.parametrize(("slots", "ahead"), [(1, 0), (1, 4), (4, 0), (4, 12)])
def test_chances_are_those_of_dice(slots: int, ahead: int) -> None:
    """Needs that vary as much as their mean, at several deadlines: within a tenth of 4,000 rolls. By means alone the
    first of four slots would get free at 10 s instead of 2.5 s."""
    work = Work(0.0, sorted(EXPONENTIAL))
    told, true = [], []
    for left_s in (5.0, 10.0, 20.0, 40.0, 60.0):
        lanes: list[list[Slot]] = [[Holder(n, work) for n in range(slots)]]
        waiting = [Waiter(100 + n, False, [work]) for n in range(ahead)] + [Waiter(999, False, [work], left_s)]
        told.append(chances(lanes, waiting)[-1])
        dice = random.Random(f"{slots} {ahead} {left_s}")
        true.append(sum(rolled(dice, slots, ahead, left_s) for _ in range(4000)) / 4000)
    assert told == pytest.approx(true, abs=0.1)


def test_draws_are_even() -> None:
    """Each of as many options as there are scenarios is drawn once by each task, and two tasks draw differently."""
    work = Work(0.0, [float(n) for n in range(SCENARIOS)])
    draws = [[Holder(number, work).free_in_s(scenario) for scenario in range(SCENARIOS)] for number in range(50)]
    assert all(sorted(one) == work.decode_s for one in draws)
    assert len({tuple(one) for one in draws}) > 40
