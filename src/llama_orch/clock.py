"""The one place where time, randomness and identifiers come from, so that the core can do without them."""

from __future__ import annotations

import asyncio
import secrets
import time
import uuid
from datetime import UTC, datetime
from typing import Protocol


class Clock(Protocol):
    """Time in seconds. `now` never goes back; `wall` is for people."""

    def now(self) -> float: ...

    def wall(self) -> float: ...


def _boot_s() -> float:
    """Seconds that never go back, a machine's sleep included: a deadline passes while the lid is closed."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class SystemClock:
    """This machine's clocks. Not the event loop's: uvloop's moves in milliseconds."""

    def __init__(self) -> None:
        self._origin = _boot_s()
        self._started_at = time.time()

    def now(self) -> float:
        return _boot_s() - self._origin

    def wall(self) -> float:
        # Not time.time(): the differences between a task's timestamps must not jump when the clock is set.
        return self._started_at + self.now()


class LoopClock:
    """The running event loop's time, for the virtual-time loop. `started_at` is what `wall` counts from."""

    def __init__(self, started_at: float = 0.0) -> None:
        self._started_at = started_at

    def now(self) -> float:
        return asyncio.get_running_loop().time()

    def wall(self) -> float:
        return self._started_at + self.now()


def timestamp(wall_s: float) -> str:
    """RFC 3339 in UTC with milliseconds."""
    return datetime.fromtimestamp(wall_s, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def new_id() -> str:
    return str(uuid.uuid4())


def new_seed() -> int:
    """A seed that every engine can take as it is: 31 bits."""
    return secrets.randbits(31)
