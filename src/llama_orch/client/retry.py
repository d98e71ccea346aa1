"""Whether to try again, and when (HP-ERR-3). No I/O, no clock: the caller of `Attempts` sends and sleeps.

What is tried again
    1. A 429 or 503 that says `retriable`: the service has room, or its model, or itself, back later. Nothing has
       happened, so that this holds for every call.
    2. A connection that was refused: the service restarts. Nothing has happened either. Unless it is told to wait for a
       service that never answered, a client that finds nobody at its first request says so at once.
    3. A connection that broke before the answer: perhaps something has happened, so only a call that comes to the same
       when it is sent twice is sent again. A task is one of these, since its id was chosen before the first attempt.
    4. A stream that broke: it goes on behind the last frame that came whole.
What is not: every other status, a server that takes the request and says nothing (a time-out), and a refusal that says
`retriable: false`, such as a spent budget.

How long it waits
    Never less than the service asks: X-Backoff-Ms, else Retry-After, else `retry_after_ms` of the body. Where it names
    no wait: 0.25 s, doubled with each failure in a row, at most 4 s. On top of either comes the jitter: a random part,
    even between nothing and a quarter of the wait (JITTER), at most 1 s (JITTER_MAX_S). It is there for those who were
    told the same moment, such as the end of a load, or who lost their connections at the same one. It is small, because
    the service gives each caller whom it sends away a turn of its own: who comes much later than its turn leaves a
    place empty. It is never subtracted: who comes too early is refused again, and has made it worse for all.

When it gives up
    At ATTEMPTS_MAX requests in a row without success, or as soon as the next wait would bring the sum of waits over
    WAIT_MAX_S; the caller may set both. Then it raises the last failure at once instead of waiting in vain. The random
    part alone never makes it give up: it is cut to what is left. A new frame of a stream is a success.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import httpx

from llama_orch.client.errors import UnreachableError
from llama_orch.client.wire import Peer

ATTEMPTS_MAX = 8
WAIT_MAX_S = 60.0
JITTER, JITTER_MAX_S = 0.25, 1.0
_BACKOFF_S, _DOUBLINGS_MAX = 0.25, 4
_NOT_SENT = (httpx.UnsupportedProtocol, httpx.LocalProtocolError)  # will be no better the next time


@dataclass(frozen=True, slots=True)
class Patience:
    """The caller's limits for one call. `dice` gives a number from 0 up to 1."""

    attempts_max: int
    wait_max_s: float
    waits_for_start: bool
    dice: Callable[[], float]


class Attempts:
    """One call's attempts. Each method hears of a failure and returns the seconds to wait before the next attempt, or
    raises what the caller is to hear."""

    def __init__(self, peer: Peer, patience: Patience, *, is_repeatable: bool) -> None:
        self._peer = peer
        self._patience = patience
        self._is_repeatable = is_repeatable
        self._made = 0
        self._waited_s = 0.0

    def renew(self) -> None:
        """Something came of it: the limits are those of a new call."""
        self._made, self._waited_s = 0, 0.0

    def refused(self, status: int, headers: httpx.Headers, content: bytes) -> float:
        """The service answered, but not with success. Raises ApiError."""
        self._peer.has_answered = True
        self._made += 1
        failure = self._peer.failure(status, headers, content)
        wait_s = self._wait_s(failure.retry_after_s) if failure.can_pass else None
        if wait_s is None:
            raise failure
        return wait_s

    def failed(self, error: httpx.TransportError) -> float:
        """There was no answer. Raises UnreachableError."""
        self._made += 1
        url = self._peer.url
        if isinstance(error, _NOT_SENT):
            raise UnreachableError(f"{url} cannot be asked: {error}") from error
        if isinstance(error, httpx.ConnectError):
            may_come = self._peer.has_answered or self._patience.waits_for_start
            if not may_come or (wait_s := self._wait_s(None)) is None:
                raise UnreachableError(f"nothing answers at {url}", is_refused=True) from error
            return wait_s
        is_final = not self._is_repeatable or isinstance(error, httpx.TimeoutException)
        if is_final or (wait_s := self._wait_s(None)) is None:
            raise UnreachableError(f"no answer from {url}: {error or type(error).__name__}") from error
        return wait_s

    def broke(self, what: str, cause: Exception | None, asked_s: float | None) -> float:
        """A stream ended before its last frame. `asked_s`: its own `retry:`. Raises UnreachableError."""
        self._made += 1
        if (wait_s := self._wait_s(asked_s)) is None:
            raise UnreachableError(f"{what} broke and could not be taken up again") from cause
        return wait_s

    def _wait_s(self, asked_s: float | None) -> float | None:
        """Seconds; None where it is time to give up."""
        least_s = backoff_s(self._made) if asked_s is None else asked_s
        left_s = self._patience.wait_max_s - self._waited_s
        if self._made >= self._patience.attempts_max or least_s > left_s:
            return None
        wait_s = min(left_s, least_s + self._patience.dice() * min(JITTER_MAX_S, JITTER * least_s))
        self._waited_s += wait_s
        return wait_s


def backoff_s(failures: int) -> float:
    """Where the server named no wait: 0.25 s, doubled each time, to 4 s."""
    return math.ldexp(_BACKOFF_S, min(failures - 1, _DOUBLINGS_MAX))
