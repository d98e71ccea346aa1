"""An asyncio loop in virtual time: where nothing is ready it jumps to the next timer, and an hour passes at once.

Where nothing is ready and no timer is set either, nothing can ever happen again: that is reported as a deadlock instead
of a test that hangs; and so is what runs in circles without any time passing. Use one loop per run, and neither threads
nor real sockets: the loop does not wait for them.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

TURNS_MAX = 50_000  # of the loop at one moment


class VirtualLoop(asyncio.SelectorEventLoop):
    """`time()` starts at 0.0 and counts virtual seconds."""

    def __init__(self) -> None:
        self._now = 0.0
        super().__init__(_JumpingSelector(self))

    def time(self) -> float:
        return self._now

    def jump(self, seconds: float) -> None:
        self._now += seconds


class _JumpingSelector(selectors.SelectSelector):
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop
        self._turns = 0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """`timeout` is the time to the next timer, None where there is none, 0 where callbacks are ready to run."""
        ready = super().select(0)
        if ready or timeout == 0:
            self._turns += 1
            if self._turns > TURNS_MAX:
                self._turns = 0  # the tasks that are canceled now have their turns
                raise RuntimeError(f"livelock: {TURNS_MAX} turns at {self._loop.time():g} s; {_waiting(self._loop)}")
            return ready
        self._turns = 0
        if timeout is None:
            raise RuntimeError(f"deadlock: nothing is ready and nothing is scheduled; {_waiting(self._loop)}")
        self._loop.jump(timeout)
        return []


def _waiting(loop: VirtualLoop) -> str:
    names = sorted(task.get_name() for task in asyncio.all_tasks(loop))
    return f"tasks that wait: {', '.join(names)}" if names else "no task is left"


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run` on a fresh virtual loop."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(coroutine)
