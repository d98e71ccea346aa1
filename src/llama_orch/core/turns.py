"""When those who found no room in a queue were told to come again.

Told the same moment, all of them would come for the one place that gets free then, and all but one be refused again:
half the square of their number in requests. So each is given the next place that nobody was given yet (HP-ERR-2).
Nothing is reserved: whoever comes first takes a place, and a turn that has passed is forgotten. Who comes before its
turn and finds no room keeps it.
"""

from __future__ import annotations

from collections.abc import Callable

TURNS_MAX = 1024  # of a pool; beyond them all are told what the last one was

Key = str | bytes


class Turns:
    """One pool's. `key`: what tells one caller that comes again from another one that comes. Times are seconds of the
    scheduler's clock."""

    def __init__(self) -> None:
        self._at_s: dict[Key, float] = {}

    def __len__(self) -> int:
        return len(self._at_s)

    def give(self, key: Key, now: float, place_in_s: Callable[[int], float]) -> float:
        """Seconds until the turn of `key`. `place_in_s`: seconds until a place gets free for one who lets so many
        others go first."""
        self._at_s = {one: at_s for one, at_s in self._at_s.items() if at_s > now}
        held_s = self._at_s.pop(key, None)
        if held_s is not None:  # its place, unless the queue has drained faster than it seemed
            ahead = sum(at_s < held_s for at_s in self._at_s.values())
            at_s = min(held_s, now + place_in_s(ahead))
        else:
            at_s = now + place_in_s(len(self._at_s))
        if len(self._at_s) < TURNS_MAX:
            self._at_s[key] = at_s
        return at_s - now

    def ahead(self, now: float) -> int:
        """How many are still to come."""
        return sum(at_s > now for at_s in self._at_s.values())

    def came(self, key: Key) -> None:
        """It has found room."""
        self._at_s.pop(key, None)
