"""The bounded queue of one pool: `interactive` before `batch`, first in first out within each (HP-ADM-1, HP-ADM-2)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Literal

from llama_orch.contract.models import Priority
from llama_orch.core.line import Line

FullPolicy = Literal["reject", "drop-lru"]

# From first served to last served.
PRIORITIES: tuple[Priority, ...] = (Priority.INTERACTIVE, Priority.BATCH)


class QueueFull(Exception):
    """No room, and the policy finds nothing to drop for this newcomer."""


class TaskQueue:
    """Task ids in order. Every operation takes constant or logarithmic time, at any length."""

    def __init__(self, capacity: int, full_policy: FullPolicy) -> None:
        self.capacity = capacity
        self.full_policy: FullPolicy = full_policy
        self.lines = {priority: Line() for priority in PRIORITIES}
        self._length = 0  # asked for at every turn of the scheduler

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[str]:
        """Ids in the order of service."""
        for line in self.lines.values():
            yield from line

    def depth(self, priority: Priority) -> int:
        return len(self.lines[priority])

    def has_ahead_of(self, newcomer: Priority) -> bool:
        """Whether anybody waits who goes before a newcomer of this priority."""
        return any(self.lines[priority] for priority in PRIORITIES[: PRIORITIES.index(newcomer) + 1])

    def is_closed_to(self, newcomer: Priority) -> bool:
        """Whether `put` would raise QueueFull."""
        if len(self) < self.capacity:
            return False
        return self.full_policy == "reject" or self._droppable(newcomer) is None

    def put(self, task_id: str, priority: Priority) -> str | None:
        """Append; return the id that was dropped to make room, if any. Raises QueueFull."""
        dropped = self._make_room(priority)
        self.lines[priority].put(task_id)
        self._length += 1
        return dropped

    def _make_room(self, newcomer: Priority) -> str | None:
        if len(self) < self.capacity:
            return None
        victims = None if self.full_policy == "reject" else self._droppable(newcomer)
        if victims is None:
            raise QueueFull
        dropped = self.lines[victims].first()
        if dropped is not None:
            self.remove(dropped)
        return dropped

    def _droppable(self, newcomer: Priority) -> Priority | None:
        """The lowest priority that is present (HP-ADM-3), unless the newcomer would be served later than it."""
        for priority in reversed(PRIORITIES):
            if self.lines[priority]:
                return priority if PRIORITIES.index(priority) >= PRIORITIES.index(newcomer) else None
        return None

    def head(self) -> str | None:
        for line in self.lines.values():
            if (first := line.first()) is not None:
                return first
        return None

    def remove(self, task_id: str) -> bool:
        """Take out, wherever it stands; False when it is not here."""
        for line in self.lines.values():
            if task_id in line:
                line.remove(task_id)
                self._length -= 1
                return True
        return False

    def place(self, task_id: str) -> int:
        """Tasks ahead of it; KeyError when it is not here."""
        ahead = 0
        for line in self.lines.values():
            if task_id in line:
                return ahead + line.place(task_id)
            ahead += len(line)
        raise KeyError(task_id)

    def first(self, count: int) -> list[str]:
        """So many of them, in the order of service; all where there are fewer."""
        return list(islice(self, count))

    def sample(self, count: int) -> list[str]:
        """So many of them, evenly over the whole queue; all where there are fewer."""
        if len(self) <= count:
            return list(self)
        return [self.at((2 * step + 1) * len(self) // (2 * count)) for step in range(count)]

    def at(self, place: int) -> str:
        """Who has so many ahead; IndexError where nobody has."""
        for line in self.lines.values():
            if place < len(line):
                return line.at(place)
            place -= len(line)
        raise IndexError(place)
