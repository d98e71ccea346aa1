"""The queue against two plain lists, under any mix of puts, removals and takings from the head."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, rule

from llama_orch.contract.models import Priority
from llama_orch.core.queue import PRIORITIES, FullPolicy, QueueFull, TaskQueue

INTERACTIVE, BATCH = Priority.INTERACTIVE, Priority.BATCH


def full_queue(policy: FullPolicy, *priorities: Priority) -> TaskQueue:
    """A queue without room, of tasks "0", "1" … in this order of arrival."""
    queue = TaskQueue(len(priorities), policy)
    for number, priority in enumerate(priorities):
        assert queue.put(str(number), priority) is None
    return queue


@pytest.mark.spec("HP-ADM-1")
def test_interactive_goes_before_batch_that_came_earlier() -> None:
    """Service is by priority first and by arrival second."""
    queue = full_queue("reject", BATCH, INTERACTIVE, BATCH, INTERACTIVE)
    assert list(queue) == ["1", "3", "0", "2"]
    assert [queue.place(task_id) for task_id in ("1", "3", "0", "2")] == [0, 1, 2, 3]


@pytest.mark.spec("HP-ADM-3")
@pytest.mark.parametrize("newcomer", PRIORITIES)
def test_reject_refuses_and_changes_nothing(newcomer: Priority) -> None:
    """Under `reject` a full queue keeps whom it has, whoever comes."""
    queue = full_queue("reject", BATCH, INTERACTIVE)
    with pytest.raises(QueueFull):
        queue.put("new", newcomer)
    assert list(queue) == ["1", "0"]


@pytest.mark.spec("HP-ADM-3")
@pytest.mark.parametrize(
    ("present", "newcomer", "victim"),
    [
        ((INTERACTIVE, BATCH, BATCH), INTERACTIVE, "1"),
        ((INTERACTIVE, BATCH, BATCH), BATCH, "1"),
        ((INTERACTIVE, INTERACTIVE), INTERACTIVE, "0"),
        ((INTERACTIVE, INTERACTIVE), BATCH, None),
        ((), INTERACTIVE, None),
    ],
)
def test_drop_lru_drops_the_oldest_of_the_lowest_priority(
    present: tuple[Priority, ...], newcomer: Priority, victim: str | None
) -> None:
    """The victim is the oldest of the lowest priority present, and never one that outranks the newcomer."""
    queue = full_queue("drop-lru", *present)
    if victim is None:
        with pytest.raises(QueueFull):
            queue.put("new", newcomer)
    else:
        assert queue.put("new", newcomer) == victim
    assert len(queue) == len(present)


@pytest.mark.spec("HP-ADM-1")
def test_who_is_ahead_of_a_newcomer() -> None:
    """Batch tasks are not ahead of an interactive newcomer; everybody else who waits is."""
    queue = full_queue("reject", BATCH)
    assert not queue.has_ahead_of(INTERACTIVE)
    assert queue.has_ahead_of(BATCH)
    assert full_queue("reject", INTERACTIVE).has_ahead_of(BATCH)


def test_an_id_that_does_not_wait_is_not_removed() -> None:
    """Removal says whether there was something to remove."""
    queue = full_queue("reject", BATCH)
    assert queue.remove("0")
    assert not queue.remove("0")
    assert queue.head() is None


class QueueMachine(RuleBasedStateMachine):
    """Model: one list of ids for each priority, oldest first."""

    ids = Bundle("ids")

    @initialize(capacity=st.integers(0, 5), policy=st.sampled_from(["reject", "drop-lru"]))
    def start(self, capacity: int, policy: FullPolicy) -> None:
        self.queue = TaskQueue(capacity, policy)
        self.lines: dict[Priority, list[str]] = {INTERACTIVE: [], BATCH: []}
        self.put_in = self.left = 0

    def order(self) -> list[str]:
        return self.lines[INTERACTIVE] + self.lines[BATCH]

    def expected_victim(self, newcomer: Priority) -> str | None:
        """Only for a full queue. None: refused."""
        if self.queue.full_policy == "reject":
            return None
        if self.lines[BATCH]:
            return self.lines[BATCH][0]
        return self.lines[INTERACTIVE][0] if newcomer is INTERACTIVE and self.lines[INTERACTIVE] else None

    def take_out(self, task_id: str) -> None:
        for line in self.lines.values():
            if task_id in line:
                line.remove(task_id)
        self.left += 1

    @rule(target=ids, priority=st.sampled_from(PRIORITIES))
    def put(self, priority: Priority) -> object:
        task_id = f"t{self.put_in}"
        is_full = len(self.order()) >= self.queue.capacity
        victim = self.expected_victim(priority) if is_full else None
        if is_full and victim is None:
            with pytest.raises(QueueFull):
                self.queue.put(task_id, priority)
            return multiple()
        assert self.queue.put(task_id, priority) == victim
        if victim is not None:
            self.take_out(victim)
        self.lines[priority].append(task_id)
        self.put_in += 1
        return task_id

    @rule(task_id=ids)
    def remove(self, task_id: str) -> None:
        is_here = task_id in self.order()
        assert self.queue.remove(task_id) is is_here
        if is_here:
            self.take_out(task_id)

    @rule()
    def serve_head(self) -> None:
        head = self.queue.head()
        assert head == next(iter(self.order()), None)
        if head is not None:
            self.queue.remove(head)
            self.take_out(head)

    @invariant()
    def holds_what_the_lists_hold(self) -> None:
        order = self.order()
        assert list(self.queue) == order
        assert [self.queue.place(task_id) for task_id in order] == list(range(len(order)))
        assert self.queue.first(2) == order[:2]
        assert self.queue.sample(len(order)) == order
        thinned = self.queue.sample(3)
        assert thinned == [one for one in order if one in thinned]
        assert len(thinned) == min(3, len(order))
        assert {p: self.queue.depth(p) for p in PRIORITIES} == {p: len(self.lines[p]) for p in PRIORITIES}
        assert self.queue.has_ahead_of(BATCH) is bool(order)
        assert self.queue.has_ahead_of(INTERACTIVE) is bool(self.lines[INTERACTIVE])

    @invariant()
    def is_bounded_and_loses_nothing(self) -> None:
        assert len(self.queue) <= self.queue.capacity
        assert self.put_in == self.left + len(self.queue)


QueueMachine.TestCase.settings = settings(
    max_examples=100, stateful_step_count=30, derandomize=True, deadline=None, database=None
)


@pytest.mark.spec("HP-ADM-1", "HP-ADM-2", "HP-ADM-3")
class TestQueueMachine(QueueMachine.TestCase):
    """Bound, order, victim and conservation hold after every operation."""
