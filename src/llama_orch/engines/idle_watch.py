"""When an engine has said nothing for too long."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class IdleWatch:
    """Closes a stream on which nothing came for too long. One timer for each period of silence, none for each token;
    time in which nobody reads the stream is not the engine's."""

    def __init__(self, seconds: float, fire: Callable[[], None]) -> None:
        self.seconds = seconds
        self.has_fired = False
        self.is_waiting = True
        self._fire = fire
        self._loop = asyncio.get_running_loop()
        self._touched_at = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        self.touch()
        self._timer = self._loop.call_later(self.seconds, self._look)

    def touch(self) -> None:
        self._touched_at = self._loop.time()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        if not self.is_waiting:
            self.touch()
        left = self._touched_at + self.seconds - self._loop.time()
        if left > 0:
            self._timer = self._loop.call_later(left, self._look)
        else:
            self.has_fired = True
            self._fire()
