"""The tasks that the service knows: those that have not ended, and those that ended lately. Deadlines in order."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque

from llama_orch.core.task import ENDED, Task
from llama_orch.errors import NotFound

RETAINED_MAX = 10_000  # ended tasks kept at most, however long the time of retention is


class TaskTable:
    """`retain_s`: how long a task stays readable once it has ended and holds no slot."""

    def __init__(self, retain_s: float) -> None:
        self.tasks: dict[str, Task] = {}
        self._retain_s = retain_s
        self._deadlines: list[tuple[float, int, str]] = []  # sorted; of the tasks that have not ended
        self._ended: deque[tuple[float, str]] = deque()

    def known(self, task_id: str) -> Task:
        try:
            return self.tasks[task_id]
        except KeyError:
            raise NotFound(f"no task {task_id}; ended tasks are kept for {self._retain_s:.0f} s") from None

    def add(self, task: Task) -> None:
        self.tasks[task.task_id] = task
        if task.deadline_s is not None:
            insort(self._deadlines, (task.deadline_s, task.number, task.task_id))

    def withdraw(self, task: Task) -> None:
        """It was not admitted after all."""
        del self.tasks[task.task_id]
        self.settle_deadline(task)

    def settle_deadline(self, task: Task) -> None:
        """The deadline means nothing any more."""
        if task.deadline_s is not None:
            del self._deadlines[bisect_left(self._deadlines, (task.deadline_s, task.number, task.task_id))]

    def retire(self, task: Task, now: float) -> None:
        """Once a task has ended and holds nothing, its time of retention begins."""
        if task.state in ENDED and task.lease is None:
            self._ended.append((now, task.task_id))

    def next_late(self, now: float) -> Task | None:
        """A task whose deadline has passed."""
        if self._deadlines and self._deadlines[0][0] <= now:
            return self.tasks[self._deadlines[0][2]]
        return None

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
        due = [self._deadlines[0][0]] if self._deadlines else []
        if self._ended:
            ended_s = self._ended[0][0]
            due.append(ended_s if len(self._ended) > RETAINED_MAX else ended_s + self._retain_s)
        return due
