"""The table of a task's life is the whole truth: what it lacks cannot happen."""

from __future__ import annotations

from itertools import product

import pytest

from llama_orch.contract.models import Determinism, Priority, TaskState
from llama_orch.core.task import ENDED, TRANSITIONS, Task, TaskEvent
from llama_orch.testing.builders import a_pool, a_task

ALL_PAIRS = list(product(TaskState, TaskEvent))


def task_in(state: TaskState, **overrides: object) -> Task:
    return Task(
        request=a_task(**overrides),
        task_id="t",
        number=1,
        pool=a_pool(),
        seed=1,
        max_tokens=10,
        correlation_id="c",
        created_s=0.0,
        deadline_s=None,
        tokens_in=1,
        state=state,
    )


@pytest.mark.parametrize(("state", "event"), [pair for pair in ALL_PAIRS if pair not in TRANSITIONS])
def test_a_step_that_the_table_lacks_is_refused(state: TaskState, event: TaskEvent) -> None:
    """An illegal step raises and leaves the task as it was."""
    task = task_in(state)
    with pytest.raises(KeyError):
        task.step(event)
    assert task.state is state


@pytest.mark.parametrize(("state", "event"), list(TRANSITIONS))
def test_a_step_of_the_table_is_taken(state: TaskState, event: TaskEvent) -> None:
    """A legal step leads where the table says, and never back to waiting."""
    task = task_in(state)
    task.step(event)
    assert task.state is TRANSITIONS[state, event]
    assert task.state is not TaskState.QUEUED


@pytest.mark.spec("HP-STR-1")
def test_final_states_are_final() -> None:
    """No step leads out of an ended state, and every other state has a way to one."""
    assert {state for state, _ in TRANSITIONS}.isdisjoint(ENDED)
    for state in set(TaskState) - ENDED:
        assert {TRANSITIONS[pair] for pair in TRANSITIONS if pair[0] is state} & ENDED


@pytest.mark.spec("HP-ADM-4")
def test_a_task_is_strict_and_interactive_unless_it_says_otherwise() -> None:
    """The defaults of the request are those of the task."""
    plain = task_in(TaskState.QUEUED)
    assert (plain.is_strict, plain.priority) == (True, Priority.INTERACTIVE)
    other = task_in(TaskState.QUEUED, determinism=Determinism.BEST_EFFORT, priority=Priority.BATCH)
    assert (other.is_strict, other.priority) == (False, Priority.BATCH)
