"""The queue of one pool, played forward: when will each of those who wait start?

Who comes in at the end changes nothing for those before, so what was played stays of use until somebody leaves, a slot
changes hands, or something new was learned; a newcomer costs one more step. Only the first EXACT_MAX are played. Those
behind them start at the same pace, corrected by what a sample of all needs more or less than they do: that far away
single tasks even out, and nothing that the service does for one may take longer because a hundred thousand others wait.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from llama_orch.core.estimate import Lane
from llama_orch.core.replica import Replica

EXACT_MAX = 100
SAMPLE = 256  # of those who wait
FRESH_S = 0.1  # that long the progress of running tasks may be overlooked
PACE_FRESH_S = 5.0  # that long the sample may be that of before, unless the queue has grown or shrunk by PACE_SHARE
PACE_SHARE = 0.25
WAIT_MIN_S = 0.001


@dataclass(frozen=True, slots=True)
class Pace:
    """How much longer than the tasks in front all tasks take on the average, as a factor; and when that was found."""

    at_s: float
    length: int
    factor: float

    def is_of_use(self, length: int, now: float) -> bool:
        return 0 <= now - self.at_s < PACE_FRESH_S and abs(length - self.length) <= PACE_SHARE * self.length


@dataclass(slots=True)
class Course:
    """The lanes at the time `at_s` with the tasks of some lines on them. `key`: what it depends on besides those."""

    key: Hashable
    at_s: float
    replicas: Sequence[Replica]
    lanes: list[Lane]  # one for each of them
    earliest_s: float = 0.0  # nobody overtakes: the start of the last one (HP-ADM-2)
    starts_s: dict[str, float] = field(default_factory=dict)  # of all who were played, from at_s on
    played: int = 0  # of the line that it ends with

    def is_of_use(self, key: Hashable, now: float) -> bool:
        return self.key == key and 0 <= now - self.at_s < FRESH_S

    def branch(self, key: Hashable) -> Course:
        """Another one that goes on from here."""
        lanes = [Lane(list(lane.free_in_s), lane.number) for lane in self.lanes]
        return Course(key, self.at_s, self.replicas, lanes, self.earliest_s, self.starts_s.copy())

    def left_s(self, start_s: float, now: float) -> float:
        """Until a start of this course: never 0 while there is something to wait for."""
        return max(start_s + self.at_s - now, min(start_s, WAIT_MIN_S))

    def interval_s(self) -> float:
        """Between two starts, on the average of those who were played; 0 where fewer than two were."""
        first_s = next(iter(self.starts_s.values()), 0.0)
        return (self.earliest_s - first_s) / max(1, len(self.starts_s) - 1)

    def next_start_s(self, *, exclusive: bool) -> float:
        """Of one who would come now."""
        return max(self.earliest_s, self._first(exclusive=exclusive)[1])

    def play(self, task_id: str, services_s: Sequence[float], *, exclusive: bool) -> None:
        """Put it behind the others. `services_s`: seconds on each lane, by the lane's number."""
        lane, start_s = self._first(exclusive=exclusive)
        self.earliest_s = max(self.earliest_s, start_s)
        self.starts_s[task_id] = self.earliest_s
        lane.occupy(self.earliest_s + services_s[lane.number], exclusive=exclusive)
        self.played += 1

    def _first(self, *, exclusive: bool) -> tuple[Lane, float]:
        """The lane that gets free first, and when; of several the one with the lowest number."""
        lane, start_s = self.lanes[0], self.lanes[0].start(exclusive=exclusive)
        for other in self.lanes[1:]:
            if (other_s := other.start(exclusive=exclusive)) < start_s:
                lane, start_s = other, other_s
        return lane, start_s
