"""The bounded queue of one pool: `interactive` before `batch`, first in first out within each (HP-ADM-1, HP-ADM-2)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Literal

from llama_orch.contract.models import Priority

FullPolicy = Literal["reject", "drop-lru"]

# From first served to last served.
PRIORITIES: tuple[Priority, ...] = (Priority.INTERACTIVE, Priority.BATCH)


class QueueFull(Exception):
    """No room, and the policy finds nothing to drop for this newcomer."""


class TaskQueue:
    """Task ids in order. Every operation but `positions` takes constant time, at any length."""

    def __init__(self, capacity: int, full_policy: FullPolicy) -> None:
        self.capacity = capacity
        self.full_policy: FullPolicy = full_policy
        # OrderedDict and not dict: taking the head of a dict scans over all that was removed before it.
        self._lines: dict[Priority, OrderedDict[str, None]] = {priority: OrderedDict() for priority in PRIORITIES}
        self._length = 0  # asked for at every turn of the scheduler

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[str]:
        """Ids in the order of service."""
        for line in self._lines.values():
            yield from line

    def depth(self, priority: Priority) -> int:
        return len(self._lines[priority])

    def has_ahead_of(self, newcomer: Priority) -> bool:
        """Whether anybody waits who goes before a newcomer of this priority."""
        return any(self._lines[priority] for priority in PRIORITIES[: PRIORITIES.index(newcomer) + 1])

    def is_closed_to(self, newcomer: Priority) -> bool:
        """Whether `put` would raise QueueFull."""
        if len(self) < self.capacity:
            return False
        return self.full_policy == "reject" or self._droppable(newcomer) is None

    def put(self, task_id: str, priority: Priority) -> str | None:
        """Append; return the id that was dropped to make room, if any. Raises QueueFull."""
        dropped = self._make_room(priority)
        self._lines[priority][task_id] = None
        self._length += 1
        return dropped

    def _make_room(self, newcomer: Priority) -> str | None:
        if len(self) < self.capacity:
            return None
        victims = None if self.full_policy == "reject" else self._droppable(newcomer)
        if victims is None:
            raise QueueFull
        self._length -= 1
        return self._lines[victims].popitem(last=False)[0]

    def _droppable(self, newcomer: Priority) -> Priority | None:
        """The lowest priority that is present (HP-ADM-3), unless the newcomer would be served later than it."""
        for priority in reversed(PRIORITIES):
            if self._lines[priority]:
                return priority if PRIORITIES.index(priority) >= PRIORITIES.index(newcomer) else None
        return None

    def head(self) -> str | None:
        return next(iter(self), None)

    def remove(self, task_id: str) -> bool:
        """Take out, wherever it stands; False when it is not here."""
        for line in self._lines.values():
            if task_id in line:
                del line[task_id]
                self._length -= 1
                return True
        return False

    def positions(self) -> dict[str, int]:
        """Id -> tasks ahead of it, for all in one pass."""
        return {task_id: position for position, task_id in enumerate(self)}
