"""When will a waiting task start? Measured speeds, played forward over the slots that there are.

Null is an answer: nothing is predicted before two tasks of the model have been measured (HP-ADM-5).
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from dataclasses import dataclass, field

SAMPLES_MIN = 2
WEIGHT = 1 / 32  # of a new sample in the moving averages: answers differ in length, and few samples say little of them
LENGTHS_KEPT = 256
OPTIONS_MAX = 32  # lengths that are told apart where chances are weighed
WAIT_GUESS_S = 0.5  # per task ahead, for a refusal's advice before anything was measured
OVERDUE_SHARE = 0.1  # what outlives its estimate is taken to need this much of it more


@dataclass(slots=True)
class Average:
    """Exponentially weighted mean and variance."""

    samples: int = 0
    mean: float = 0.0
    variance: float = 0.0

    def add(self, value: float) -> None:
        self.samples += 1
        weight = max(WEIGHT, 1 / self.samples)  # the first ones count alike
        delta = value - self.mean
        self.mean += weight * delta
        self.variance = (1 - weight) * (self.variance + weight * delta * delta)


@dataclass(slots=True)
class Lengths:
    """How many tokens answers have had lately."""

    average: Average = field(default_factory=Average)
    _latest: deque[int] = field(default_factory=lambda: deque(maxlen=LENGTHS_KEPT))
    _ratios: deque[float] = field(default_factory=lambda: deque(maxlen=OPTIONS_MAX))  # of what came to what was told
    _means: dict[int, float] = field(default_factory=dict)  # by max_tokens; of use until the next answer
    _by_length: list[float] = field(default_factory=list)  # likewise

    def add(self, tokens: int, expected_tokens: int | None = None) -> None:
        self.average.add(tokens)
        self._latest.append(tokens)
        self._means.clear()
        self._by_length = []
        if expected_tokens is not None:
            self._ratios.append(tokens / max(1, expected_tokens))

    def expected(self, max_tokens: int, expected_tokens: int | None) -> float:
        """Of an answer that has not begun. The client's own word comes before experience."""
        if expected_tokens is not None:
            return min(max_tokens, expected_tokens)
        if not self._latest:
            return min(max_tokens, self.average.mean)
        if max_tokens not in self._means:
            self._means[max_tokens] = sum(min(max_tokens, length) for length in self._latest) / len(self._latest)
        return self._means[max_tokens]

    def left(self, tokens_out: int, max_tokens: int, expected_tokens: int | None) -> float:
        """Of an answer that has this many already: what the longer ones among the latest had more than that."""
        if expected_tokens is not None:
            rest = min(max_tokens, expected_tokens) - tokens_out
            return rest if rest > 0 else min(max_tokens - tokens_out, OVERDUE_SHARE * expected_tokens)
        longer = [min(max_tokens, length) - tokens_out for length in self._latest if length > tokens_out]
        if longer:
            return sum(longer) / len(longer)
        return min(max_tokens - tokens_out, OVERDUE_SHARE * tokens_out)

    def options(self, tokens_out: int, max_tokens: int, expected_tokens: int | None) -> list[float]:
        """What an answer that has this many tokens may still get, as equally likely numbers, sorted.

        The client's word is taken for as good as it has proved to be. Else there can be what there was lately, and
        something shorter and something longer than all of it: n answers leave that open with a chance of 2 in n + 2.
        """
        if expected_tokens is not None:
            whole = sorted(expected_tokens * ratio for ratio in self._ratios or (1.0,))
        else:
            whole = self._sorted()
        longer = _thinned(whole[bisect_right(whole, tokens_out) :])
        if not longer:
            return [min(max_tokens - tokens_out, OVERDUE_SHARE * (expected_tokens or tokens_out))]
        return [min(max_tokens, length) - tokens_out for length in longer]

    def _sorted(self) -> list[float]:
        if not self._by_length:
            latest = sorted(self._latest)
            self._by_length = [0.5 * latest[0], *latest, 1.5 * latest[-1]] if latest else [self.average.mean]
        return self._by_length


def _thinned(options: list[float]) -> list[float]:
    """At most OPTIONS_MAX of them, evenly."""
    if len(options) <= OPTIONS_MAX:
        return options
    return [options[(2 * step + 1) * len(options) // (2 * OPTIONS_MAX)] for step in range(OPTIONS_MAX)]


@dataclass(slots=True)
class Speeds:
    """What was measured of tasks lately, on one kind of replica. Seconds."""

    token_s: Average = field(default_factory=Average)  # per token decoded
    prompt_s: Average = field(default_factory=Average)  # per token of a prompt that was evaluated
    overhead_s: Average = field(default_factory=Average)  # the rest of the time on a slot

    def learn(
        self, *, service_s: float, decode_s: float, tokens_out: int, prefill_s: float = 0.0, tokens_read: int = 0
    ) -> None:
        if tokens_out > 0:
            self.token_s.add(decode_s / tokens_out)
        if tokens_read > 0:
            self.prompt_s.add(prefill_s / tokens_read)
        self.overhead_s.add(max(0.0, service_s - decode_s - prefill_s))

    @property
    def is_known(self) -> bool:
        return self.overhead_s.samples > 0

    @property
    def deviation(self) -> float:
        """Relative standard deviation of the time that a token takes."""
        return self.token_s.variance**0.5 / self.token_s.mean if self.token_s.mean > 0 else 0.0

    def rates_s(self) -> tuple[float, float, float]:
        """Expected time on a slot, as what it takes in any case, for each token of a prompt, for each of an answer."""
        return self.overhead_s.mean, self.prompt_s.mean, self.token_s.mean

    def service_s(self, tokens_in: float, tokens_out: float) -> float:
        """Expected time on a slot."""
        return self.overhead_s.mean + tokens_in * self.prompt_s.mean + tokens_out * self.token_s.mean


@dataclass(slots=True)
class Lane:
    """One replica's slots as the times, from now, at which each gets free. `number` finds its service times."""

    free_in_s: list[float]
    number: int = 0

    def start(self, *, exclusive: bool) -> float:
        return max(self.free_in_s) if exclusive else min(self.free_in_s)

    def occupy(self, until_s: float, *, exclusive: bool) -> None:
        if exclusive:
            self.free_in_s = [until_s] * len(self.free_in_s)
        else:
            self.free_in_s[self.free_in_s.index(min(self.free_in_s))] = until_s
