"""How likely is a task on time? The queue is played forward in SCENARIOS that are equally likely, each with other
lengths of the answers that run and wait; what a task's own answer may still need is then weighed exactly.

Means alone would not do. The first of four slots gets free sooner than any of them does on the average, and an answer
is often far shorter or longer than its mean. Tasks that miss their deadlines leave, and those behind them gain by it.

There are no dice: a task draws from its options by its number and the scenario's, each option about as often as any
other, so that the same state always has the same chances.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

SCENARIOS = 128  # a power of two: an odd multiplier makes a permutation of them
SCENARIOS_MIN = 8  # in front of a long queue
STEPS_MAX = 1536  # tasks times scenarios, above which there are fewer of them; about 8 ms
PACE_MIN = 0.2
HELD_SHARE = 0.5  # as core.dispatch: of its time on the slow card, for which a task waits for the fast one
_MASK = SCENARIOS - 1


def _normal_quantile(part: float) -> float:
    """The value that a normal variable of deviation 1 stays below with this chance."""
    low, high = -8.0, 8.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if 0.5 * (1 + math.erf(middle / math.sqrt(2))) < part else (low, middle)
    return low


_NORMAL = [_normal_quantile((step + 0.5) / SCENARIOS) for step in range(SCENARIOS)]


@dataclass(frozen=True, slots=True)
class Draw:
    """How one task meets the scenarios: two permutations of them, one for its need and one for its pace."""

    need: int
    need_start: int
    pace: int
    pace_start: int

    @classmethod
    def of(cls, number: int) -> Draw:
        mixed = (number * 0x9E37_79B1) & 0xFFFF_FFFF
        mixed = ((mixed ^ (mixed >> 15)) * 0x85EB_CA6B) & 0xFFFF_FFFF
        mixed ^= mixed >> 13
        return cls(mixed | 1, mixed >> 8, (mixed >> 16) | 1, mixed >> 24)


@dataclass(frozen=True, slots=True)
class Work:
    """What a task may need of one replica: seconds in any case, and equally likely further ones, sorted. `deviation` is
    the relative one of the speed."""

    fixed_s: float
    decode_s: Sequence[float]
    deviation: float = 0.0
    decode_mean_s: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "decode_mean_s", sum(self.decode_s) / len(self.decode_s))

    @property
    def mean_s(self) -> float:
        return self.fixed_s + self.decode_mean_s

    def drawn_s(self, scenario: int, draw: Draw) -> float:
        """The need in one scenario."""
        step = (scenario * draw.need + draw.need_start) & _MASK
        return (self.fixed_s + self.decode_s[step * len(self.decode_s) // SCENARIOS]) * self.pace(scenario, draw)

    def chance(self, left_s: float, scenario: int, draw: Draw) -> float:
        """That it fits into the time left, at the pace of the scenario."""
        room_s = left_s / self.pace(scenario, draw) - self.fixed_s
        return bisect_right(self.decode_s, room_s + 1e-9) / len(self.decode_s)

    def pace(self, scenario: int, draw: Draw) -> float:
        """How much longer than usual everything takes."""
        if self.deviation == 0.0:
            return 1.0
        return max(PACE_MIN, 1 + self.deviation * _NORMAL[(scenario * draw.pace + draw.pace_start) & _MASK])


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a slot: a task with what it still needs, and the time after which it is ended in any case."""

    number: int
    work: Work
    left_s: float | None = None

    def free_in_s(self, scenario: int) -> float:
        needs_s = self.work.drawn_s(scenario, Draw.of(self.number))
        return needs_s if self.left_s is None else min(needs_s, max(0.0, self.left_s))


@dataclass(frozen=True, slots=True)
class Waiter:
    """A task that waits, with what it needs on each of the lanes."""

    number: int
    is_exclusive: bool
    works: Sequence[Work]
    left_s: float | None = None


Slot = Holder | float
"""Who holds it, or when it gets free."""


def own_chance(holder: Holder) -> float:
    """Of a task that runs."""
    if holder.left_s is None:
        return 1.0
    draw = Draw.of(holder.number)
    return sum(holder.work.chance(holder.left_s, scenario, draw) for scenario in range(SCENARIOS)) / SCENARIOS


def chances(lanes: Sequence[Sequence[Slot]], waiting: Sequence[Waiter]) -> list[float]:
    """Of those who wait, in order of service; 1 for who has no deadline. A lane is a replica's slots."""
    sums = [0.0] * len(waiting)
    draws = [Draw.of(one.number) for one in waiting]
    rests_s = _rests_s(waiting, len(lanes))
    means_s = [max(s.work.mean_s if isinstance(s, Holder) else s for s in lane) for lane in lanes]
    scenarios = range(0, SCENARIOS, _stride(len(waiting)))
    for scenario in scenarios:
        free = [[s.free_in_s(scenario) if isinstance(s, Holder) else s for s in lane] for lane in lanes]
        expected_s = means_s.copy()
        earliest = 0.0
        for place, one in enumerate(waiting):
            lane, start = _first(free, one, rests_s[place], expected_s)
            start = max(earliest, start)
            work, left_s, draw = one.works[lane], one.left_s, draws[place]
            if left_s is not None and start >= left_s:
                earliest = max(earliest, left_s)  # it leaves the queue then, and has held up who is behind it
                continue
            earliest = start
            end = start + work.drawn_s(scenario, draw)
            if left_s is not None:
                sums[place] += work.chance(left_s - start, scenario, draw)
                end = min(end, left_s)
            _occupy(free[lane], end, one.is_exclusive)
            expected_s[lane] = max(free[lane])
    return [1.0 if one.left_s is None else total / len(scenarios) for one, total in zip(waiting, sums, strict=True)]


def _stride(waiting: int) -> int:
    """Behind many tasks chance evens out, and fewer scenarios do."""
    stride = 1
    while stride < SCENARIOS // SCENARIOS_MIN and waiting * SCENARIOS // stride > STEPS_MAX:
        stride *= 2
    return stride


def _rests_s(waiting: Sequence[Waiter], lanes: int) -> list[list[float]]:
    """What each and all who are behind it need together, on the average, on each of the lanes."""
    rests_s, sums = [], [0.0] * lanes
    for one in reversed(waiting):
        sums = [total + work.mean_s for total, work in zip(sums, one.works, strict=True)]
        rests_s.append(sums)
    return rests_s[::-1]


def _first(
    free: Sequence[Sequence[float]], one: Waiter, rest_s: Sequence[float], expected_s: Sequence[float]
) -> tuple[int, float]:
    """The lane where a task starts, and when: the first that gets free, unless a faster one is expected to be done with
    the task and all behind it sooner. For that it waits, for as long as placement lets it, and perhaps in vain."""
    starts = [max(slots) for slots in free] if one.is_exclusive else [min(slots) for slots in free]
    start = min(starts)
    lane = starts.index(start)
    own_s = one.works[lane].mean_s
    for other, other_start in enumerate(starts):
        if one.works[other].mean_s < own_s and own_s > expected_s[other] - start + rest_s[other]:
            given_up = start + HELD_SHARE * own_s
            return (other, other_start) if other_start <= given_up else (lane, given_up)
    return lane, start


def _occupy(slots: list[float], until_s: float, is_exclusive: bool) -> None:
    if is_exclusive:
        slots[:] = [until_s] * len(slots)
    else:
        slots[slots.index(min(slots))] = until_s
