"""The tasks that the service knows: those that have not ended, and those that ended lately. Deadlines in order."""

from __future__ import annotations

from collections import deque
from heapq import heapify, heappop, heappush

from llama_orch.core.task import ENDED, Task
from llama_orch.errors import NotFound

RETAINED_MAX = 10_000  # ended tasks kept at most, however long the time of retention is


class TaskTable:
    """`retain_s`: how long a task stays readable once it has ended and holds no slot."""

    def __init__(self, retain_s: float) -> None:
        self.tasks: dict[str, Task] = {}
        self._retain_s = retain_s
        # A heap. Who has ended stays in it until it comes up, or until most of it are such.
        self._deadlines: list[tuple[float, int, str]] = []
        self._with_deadline = 0  # tasks that have one and have not ended
        self._ended: deque[tuple[float, str]] = deque()

    def known(self, task_id: str) -> Task:
        try:
            return self.tasks[task_id]
        except KeyError:
            raise NotFound(f"no task {task_id}; ended tasks are kept for {self._retain_s:.0f} s") from None

    def add(self, task: Task) -> None:
        self.tasks[task.task_id] = task
        if task.deadline_s is not None:
            heappush(self._deadlines, (task.deadline_s, task.number, task.task_id))
            self._with_deadline += 1

    def withdraw(self, task: Task) -> None:
        """It was not admitted after all."""
        del self.tasks[task.task_id]
        self.settle_deadline(task)

    def settle_deadline(self, task: Task) -> None:
        """The deadline means nothing any more."""
        if task.deadline_s is not None:
            self._with_deadline -= 1
            if len(self._deadlines) > 64 + 2 * self._with_deadline:
                self._deadlines = [one for one in self._deadlines if self._is_waited_for(one)]
                heapify(self._deadlines)

    def _is_waited_for(self, deadline: tuple[float, int, str]) -> bool:
        _, number, task_id = deadline
        task = self.tasks.get(task_id)  # an id may come again once its task is forgotten
        return task is not None and task.number == number and task.state not in ENDED

    def _next_deadline(self) -> tuple[float, int, str] | None:
        while self._deadlines and not self._is_waited_for(self._deadlines[0]):
            heappop(self._deadlines)
        return self._deadlines[0] if self._deadlines else None

    def retire(self, task: Task, now: float) -> None:
        """Once a task has ended and holds nothing, its time of retention begins."""
        if task.state in ENDED and task.lease is None:
            self._ended.append((now, task.task_id))

    def next_late(self, now: float) -> Task | None:
        """A task whose deadline has passed."""
        first = self._next_deadline()
        return self.tasks[first[2]] if first is not None and first[0] <= now else None

    def is_crowded(self, now: float) -> bool:
        """Whether the task that ended first is to be forgotten."""
        return bool(self._ended) and (self._ended[0][0] + self._retain_s <= now or len(self._ended) > RETAINED_MAX)

    def forget_oldest(self) -> str | None:
        """Give up the task that ended first; None when there is none."""
        if not self._ended:
            return None
        _, task_id = self._ended.popleft()
        del self.tasks[task_id]
        return task_id

    def next_due(self) -> list[float]:
        """When a deadline passes or a task is to be forgotten."""
        first = self._next_deadline()
        due = [] if first is None else [first[0]]
        if self._ended:
            ended_s = self._ended[0][0]
            due.append(ended_s if len(self._ended) > RETAINED_MAX else ended_s + self._retain_s)
        return due
