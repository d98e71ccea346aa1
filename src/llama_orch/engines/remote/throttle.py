"""How many requests a server takes at a time, as it says itself: backpressure, passed on.

A server that answers 429 or 503 gets nothing more until the time that it names, and then no more at a time than it had
taken; each request that it serves raises that by one, up to the slots. Who waits here holds a slot meanwhile, so that
the queue behind fills up and our own clients are told (HP-REM-5).
"""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress


class StillBusy(Exception):
    """The time to wait is over."""


class Throttle:
    """First come, first served. Times are the event loop's, in seconds."""

    def __init__(self, slots: int) -> None:
        self.limit = slots
        self.not_before = 0.0
        self._slots = slots
        self._active = 0
        self._line: deque[object] = deque()
        self._moved = asyncio.Event()

    async def enter(self, until: float) -> None:
        """Wait for a turn; StillBusy when none has come by then. Whoever got one leaves again."""
        loop, ticket = asyncio.get_running_loop(), object()
        self._line.append(ticket)
        try:
            while not self._may_go(ticket, loop.time()):
                if loop.time() >= until:
                    raise StillBusy
                pause_ends = self.not_before if self.not_before > loop.time() else until
                with suppress(TimeoutError):
                    async with asyncio.timeout_at(min(until, pause_ends)):
                        await self._moved.wait()
            self._active += 1
        finally:
            self._line.remove(ticket)
            self._move()

    def _may_go(self, ticket: object, now: float) -> bool:
        return self._line[0] is ticket and self._active < self.limit and now >= self.not_before

    def leave(self) -> None:
        self._active -= 1
        self._move()

    def refused(self, retry_after_s: float) -> None:
        """It took what it has, and not this one, which has not left yet."""
        self.limit = max(1, min(self.limit, self._active - 1))
        self.not_before = max(self.not_before, asyncio.get_running_loop().time() + retry_after_s)

    def served(self) -> None:
        self.limit = min(self._slots, self.limit + 1)

    def _move(self) -> None:
        self._moved.set()
        self._moved = asyncio.Event()
