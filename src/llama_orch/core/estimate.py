"""When will a waiting task start? Measured speeds of the pool, played forward over its slots.

Null is an answer: nothing is predicted before two tasks of the pool have been measured (HP-ADM-5).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

SAMPLES_MIN = 2
WEIGHT = 0.2  # of a new sample in the moving averages
WAIT_GUESS_S = 0.5  # per task ahead, for a refusal's advice before anything was measured


@dataclass(slots=True)
class Average:
    """Exponentially weighted mean and variance."""

    samples: int = 0
    mean: float = 0.0
    variance: float = 0.0

    def add(self, value: float) -> None:
        self.samples += 1
        weight = max(WEIGHT, 1 / self.samples)  # the first few count alike
        delta = value - self.mean
        self.mean += weight * delta
        self.variance = (1 - weight) * (self.variance + weight * delta * delta)


@dataclass(slots=True)
class Speeds:
    """What was measured of one pool's tasks lately. Seconds and tokens."""

    token_s: Average
    overhead_s: Average  # from the start on a slot to the first token and after the last: prefill mostly
    tokens_out: Average

    @classmethod
    def unknown(cls) -> Speeds:
        return cls(Average(), Average(), Average())

    @property
    def is_known(self) -> bool:
        return self.tokens_out.samples >= SAMPLES_MIN

    def learn(self, *, service_s: float, decode_s: float, tokens_out: int) -> None:
        if tokens_out > 0:
            self.token_s.add(decode_s / tokens_out)
        self.overhead_s.add(max(0.0, service_s - decode_s))
        self.tokens_out.add(tokens_out)

    def service_s(self, max_tokens: int, expected_tokens: int | None) -> float:
        """Expected time on a slot."""
        tokens = min(max_tokens, self.tokens_out.mean if expected_tokens is None else expected_tokens)
        return self.overhead_s.mean + tokens * self.token_s.mean

    def service_deviation_s(self, max_tokens: int, expected_tokens: int | None) -> float:
        """Standard deviation of the same, from the spread of lengths and of speeds, taken as independent."""
        tokens = min(max_tokens, self.tokens_out.mean if expected_tokens is None else expected_tokens)
        length = 0.0 if expected_tokens is not None else self.tokens_out.variance * self.token_s.mean**2
        return math.sqrt(length + self.token_s.variance * tokens**2 + self.overhead_s.variance)


@dataclass(slots=True)
class Lane:
    """One replica's slots as the times, from now, at which each gets free."""

    free_in_s: list[float]

    def start(self, *, exclusive: bool) -> float:
        return max(self.free_in_s) if exclusive else min(self.free_in_s)

    def occupy(self, until_s: float, *, exclusive: bool) -> None:
        if exclusive:
            self.free_in_s = [until_s] * len(self.free_in_s)
        else:
            self.free_in_s[self.free_in_s.index(min(self.free_in_s))] = until_s


def forecast(lanes: list[Lane], waiting: Iterable[tuple[str, bool, float]]) -> dict[str, float]:
    """Start times in seconds from now of (task id, exclusive, service seconds) in order of service.

    Nobody overtakes: a task starts no earlier than the one before it (HP-ADM-2).
    """
    starts: dict[str, float] = {}
    earliest = 0.0
    for task_id, exclusive, service_s in waiting:
        lane = min(lanes, key=lambda one: one.start(exclusive=exclusive))
        earliest = max(earliest, lane.start(exclusive=exclusive))
        starts[task_id] = earliest
        lane.occupy(earliest + service_s, exclusive=exclusive)
    return starts


def on_time_probability(left_s: float, mean_s: float, deviation_s: float) -> float:
    """Chance that a normally distributed rest of mean and deviation fits into the time left."""
    if deviation_s <= 0:
        return 1.0 if mean_s <= left_s else 0.0
    return 0.5 * (1 + math.erf((left_s - mean_s) / (deviation_s * math.sqrt(2))))
