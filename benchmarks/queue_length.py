"""What an operation of the scheduler costs with 100,000 tasks waiting, against the same one with 100.

    python benchmarks/queue_length.py [--long 100000] [--rounds 300]

Both schedulers in one process, in turns, on the reference cards, after enough tasks to foretell starts. An operation is
all that the service does with the core for it: to enqueue is to admit and to foretell the start; to pick is to end a
task, which starts the next one, and to look at the outlook of one that waits; to cancel is to end one that waits
somewhere, and to look at another. A part of the tasks is interactive, strict, has a deadline. Prints microseconds of
this process (minimum, median, maximum) and the ratio of the medians.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable

from llama_orch.contract.models import Determinism, Priority
from llama_orch.core.effects import Start
from llama_orch.core.scheduler import Scheduler
from llama_orch.testing.builders import a_host, a_scheduler, an_outcome, submit

OPERATIONS = ("enqueue", "pick", "cancel")


class Bench:
    """One scheduler whose queue is kept at a length."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.now = 0.0
        self._dice = random.Random(7)
        self._number = 0
        self._running: list[str] = []
        self.scheduler: Scheduler = a_scheduler(a_host("3090+3060", queue_capacity=2 * length), retain_s=1.0)
        self._queue = self.scheduler.pools["default"].queue
        while len(self._queue) < 10:
            self.enqueue()
        for _ in range(40):
            self.pick()
            self.enqueue()
        while len(self._queue) < length:
            self.enqueue()

    def _take(self) -> None:
        for effect in self.scheduler.take_effects():
            if isinstance(effect, Start):
                self._running.append(effect.task_id)

    def enqueue(self) -> None:
        self._number += 1
        dice = self._dice
        verdict = submit(
            self.scheduler,
            f"t{self._number}",
            now=self.now,
            priority=Priority.INTERACTIVE if self._number % 4 == 0 else Priority.BATCH,
            determinism=Determinism.STRICT if self._number % 2 else Determinism.BEST_EFFORT,
            deadline_ms=10**9 + dice.randrange(10**6) if self._number % 3 == 0 else None,
            max_tokens=dice.choice([64, 128, 256]),
        )
        self._take()
        if verdict.task.started_s is None:
            self.scheduler.predictor.outlook(verdict.task, self.scheduler.tasks, self.now)

    def pick(self) -> None:
        self.now += 0.5
        self.scheduler.finished(self._running.pop(0), an_outcome(tokens_out=self._dice.randrange(10, 60)), self.now)
        self.scheduler.tick(self.now)
        self._take()
        self._look(self._queue.at(len(self._queue) // 2))

    def cancel(self) -> None:
        self.scheduler.cancel(self._queue.at(self._dice.randrange(len(self._queue))), self.now)
        self._take()
        self._look(self._queue.at(len(self._queue) - 1))

    def _look(self, task_id: str) -> None:
        self.scheduler.predictor.outlook(self.scheduler.tasks[task_id], self.scheduler.tasks, self.now)


def timed_us(act: Callable[[], None]) -> float:
    began = time.thread_time_ns()
    act()
    return (time.thread_time_ns() - began) / 1000


def measured(long: int, rounds: int) -> dict[str, dict[int, list[float]]]:
    """Microseconds by operation and length."""
    benches = [Bench(100), Bench(long)]
    found: dict[str, dict[int, list[float]]] = {name: {b.length: [] for b in benches} for name in OPERATIONS}
    for _ in range(rounds):
        for bench in benches:
            # The queue's length is the same after each round: one comes for each that goes.
            for name in ("enqueue", "pick", "enqueue", "cancel"):
                found[name][bench.length].append(timed_us(getattr(bench, name)))
    return found


def report(found: dict[str, dict[int, list[float]]]) -> list[str]:
    lines = ["| operation | with 100 waiting, µs | with more, µs | ratio |", "| --- | --- | --- | --- |"]
    for name, by_length in found.items():
        (_, few), (length, many) = by_length.items()
        cells = [f"{min(v):.0f} / {statistics.median(v):.0f} / {max(v):.0f}" for v in (few, many)]
        ratio = statistics.median(many) / statistics.median(few)
        lines.append(f"| {name} ({length:,} waiting) | {cells[0]} | {cells[1]} | {ratio:.2f} |")
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--long", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=300)
    arguments = parser.parse_args()
    print("\n".join(report(measured(arguments.long, arguments.rounds))))
