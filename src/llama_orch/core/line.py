"""A line of ids in which everybody's place is known: put at the end, remove anywhere, place of one, one at a place.

Each in time logarithmic in the length, by a Fenwick tree (P. Fenwick, "A new data structure for cumulative frequency
tables", 1994) over the spots that were ever given out; spots that are empty are given up once they are most of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

_SPOTS_MIN = 64


class Line:
    """Ids, each at most once, in the order in which they were put. `removals` counts those that have left: as long as
    it is the same, everybody's place is the same."""

    def __init__(self) -> None:
        self.removals = 0
        self._spots: list[str | None] = []
        self._spot_of: dict[str, int] = {}
        self._tree = [0]  # from 1: how many are on the spots that each node covers
        self._first = 0  # no spot before it is taken

    def __len__(self) -> int:
        return len(self._spot_of)

    def __contains__(self, one: object) -> bool:
        return one in self._spot_of

    def __iter__(self) -> Iterator[str]:
        # Not over the dict: that scans over all that was removed before the first one.
        for spot in range(self._first, len(self._spots)):
            if (one := self._spots[spot]) is not None:
                yield one

    def put(self, one: str) -> None:
        """At the end."""
        self._spot_of[one] = len(self._spots)
        self._spots.append(one)
        node = len(self._spots)
        count, below = 1, node - 1
        while below > node - (node & -node):
            count += self._tree[below]
            below -= below & -below
        self._tree.append(count)

    def remove(self, one: str) -> None:
        """KeyError when it is not here."""
        spot = self._spot_of.pop(one)
        self.removals += 1
        self._spots[spot] = None
        node = spot + 1
        while node < len(self._tree):
            self._tree[node] -= 1
            node += node & -node
        if len(self._spots) > _SPOTS_MIN and len(self._spot_of) * 2 < len(self._spots):
            self._close_ranks()

    def first(self) -> str | None:
        """Who has waited longest."""
        while self._first < len(self._spots):
            if (one := self._spots[self._first]) is not None:
                return one
            self._first += 1
        return None

    def place(self, one: str) -> int:
        """How many are ahead of it; KeyError when it is not here."""
        node, ahead = self._spot_of[one], 0
        while node:
            ahead += self._tree[node]
            node -= node & -node
        return ahead

    def at(self, place: int) -> str:
        """Who has so many ahead; `place` is less than the length."""
        node, left = 0, place
        step = 1 << (len(self._spots).bit_length() - 1)
        while step:
            beyond = node + step
            if beyond < len(self._tree) and self._tree[beyond] <= left:
                node, left = beyond, left - self._tree[beyond]
            step >>= 1
        one = self._spots[node]
        if one is None:
            raise IndexError(place)
        return one

    def some(self, start: int, end: int) -> Iterator[str]:
        """Who has `start` or more ahead, and fewer than `end`."""
        if start == 0:
            yield from islice(self, end)
        else:
            for place in range(start, min(end, len(self))):
                yield self.at(place)

    def _close_ranks(self) -> None:
        waiting = list(self._spot_of)
        self._spots, self._spot_of, self._tree, self._first = [], {}, [0], 0
        for one in waiting:
            self.put(one)
