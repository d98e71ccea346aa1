"""Late binding: who starts where, and who had better wait for a faster card."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_orch.contract.models import Determinism, TaskState
from llama_orch.core.dispatch import HOLD_BACK_QUEUE_MAX
from llama_orch.core.placement import Faster, hold_back
from llama_orch.core.scheduler import Scheduler
from llama_orch.errors import AdmissionReject
from llama_orch.testing.builders import GIB, a_host, a_scheduler, an_outcome, submit

pytestmark = pytest.mark.spec("HP-PLC-1")
SHARED = Determinism.BEST_EFFORT


def measured(fast_s: float = 2.0, slow_s: float = 10.0, **spec: object) -> Scheduler:
    """A fast 3090, "default-0", and a slow 3060, "default-1", of which speeds are known, at time 100."""
    scheduler = a_scheduler(a_host("3090+3060", **spec))
    pool = scheduler.pools["default"]
    for number, service_s in ((0, fast_s), (1, slow_s)):
        for _ in range(2):
            outcome = an_outcome(decode_ms=int(service_s * 1000))
            scheduler.predictor.learn(pool, scheduler.replicas[f"default-{number}"], service_s, outcome)
    scheduler.tick(100.0)
    scheduler.take_effects()
    return scheduler


def placed(scheduler: Scheduler, *task_ids: str, now: float = 100.0) -> list[str | None]:
    return [submit(scheduler, task_id, now=now).task.replica_id for task_id in task_ids]


# -- the rule ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("service_s", "faster", "waits"),
    [
        (10.0, [], False),  # nobody is faster
        (10.0, [Faster(2.0, [2.0])], True),  # done at 4
        (10.0, [Faster(9.0, [2.0])], False),  # done at 11
        (10.0, [Faster(2.0, [2.0] * 4)], False),  # with those behind it done at 10
        (10.0, [Faster(2.0, [2.0] * 3)], True),  # at 8
        (10.0, [Faster(2.0, [2.0] * 6), Faster(3.0, [2.0] * 6)], True),  # two of them: at 2 + 12 / 2
    ],
)
def test_a_task_waits_where_the_faster_ones_are_done_with_all_sooner(
    service_s: float, faster: list[Faster], waits: bool
) -> None:
    """With it and with everybody behind it, before the slow one was done with it alone."""
    assert hold_back(service_s, faster) is waits


@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(
    service_s=st.floats(0.01, 100),
    free_in_s=st.floats(0, 100),
    services_s=st.lists(st.floats(0.01, 50), min_size=1, max_size=6),
    more_s=st.floats(0.01, 50),
)
def test_a_longer_queue_holds_nobody_back_who_was_free_to_start(
    service_s: float, free_in_s: float, services_s: list[float], more_s: float
) -> None:
    """The more wait, or the later the fast card gets free, the more use a slow card is."""
    if not hold_back(service_s, [Faster(free_in_s, services_s)]):
        assert not hold_back(service_s, [Faster(free_in_s, [*services_s, more_s])])
        assert not hold_back(service_s, [Faster(free_in_s + more_s, services_s)])


# -- in the scheduler --------------------------------------------------------------------------------------------------


@pytest.mark.spec("HP-PLC-3")
def test_a_task_that_would_be_done_sooner_on_the_fast_card_waits_for_it() -> None:
    """2 s there and at most 2 s of waiting, against 10 s on the slow card that is free."""
    scheduler = measured()
    assert placed(scheduler, "runs", "held-back") == ["default-0", None]
    scheduler.finished("runs", an_outcome(decode_ms=2000), 102.0)
    assert scheduler.tasks["held-back"].replica_id == "default-0"


def test_with_enough_of_them_the_slow_card_is_used() -> None:
    """Six tasks of 2 s each are not done in the 10 s that the slow card takes for one."""
    scheduler = measured()
    placed(scheduler, *[f"t{n}" for n in range(6)])
    assert [task.task_id for task in scheduler.tasks.values() if task.replica_id == "default-1"] == ["t1"]


def test_cards_of_equal_speed_hold_nobody_back() -> None:
    """Nor does a model that was never measured."""
    assert placed(measured(2.0, 2.0), "a", "b") == ["default-0", "default-1"]
    assert placed(a_scheduler(a_host("3090+3060")), "a", "b", now=0.0) == ["default-0", "default-1"]


def test_a_fast_card_that_is_free_is_taken_at_once() -> None:
    """Also where the slow one has more memory free and would come first: nobody waits for what is there."""
    scheduler = measured()
    scheduler.device_seen("3090", 1 * GIB, 100.0)
    assert placed(scheduler, "a", "b") == ["default-0", None]


def test_without_a_place_in_the_queue_nobody_is_held_back() -> None:
    """A task is not refused for want of a place to wait while a card is free."""
    scheduler = measured(queue_capacity=0)
    assert placed(scheduler, "a", "b") == ["default-0", "default-1"]
    with pytest.raises(AdmissionReject):
        submit(scheduler, "c", now=100.0)


def test_a_task_is_not_held_back_for_a_replica_that_is_lost() -> None:
    """It starts on the slow card as soon as the fast one is gone."""
    scheduler = measured()
    placed(scheduler, "runs", "held-back")
    scheduler.replica_lost("default-0", "gone", 100.5)
    assert scheduler.tasks["held-back"].replica_id == "default-1"


def test_a_task_is_not_held_back_for_a_replica_that_leaves() -> None:
    """One that finishes what it has takes no more."""
    scheduler = measured()
    placed(scheduler, "runs", "held-back")
    scheduler.replicas["default-0"].is_closing = True
    scheduler.tick(100.5)
    assert scheduler.tasks["held-back"].replica_id == "default-1"


def test_a_long_queue_uses_every_card() -> None:
    """Beyond that many nobody is held back, whatever the speeds are."""
    scheduler = measured(0.01, 1000.0)
    placed(scheduler, *[f"t{n}" for n in range(HOLD_BACK_QUEUE_MAX + 3)])
    assert scheduler.replicas["default-1"].slots_busy > 0


@pytest.mark.spec("HP-ADM-2")
def test_nobody_overtakes_a_task_that_is_held_back() -> None:
    """The one behind it could start on the slow card and does not."""
    scheduler = measured()
    placed(scheduler, "runs", "held-back", "behind")
    assert [scheduler.tasks[one].state for one in ("held-back", "behind")] == [TaskState.QUEUED] * 2


@pytest.mark.spec("HP-SES-3")
def test_warmth_on_a_slow_card_is_not_worth_a_late_end() -> None:
    """The session's slot is on the slow card, and the fast one is free."""
    scheduler = measured()
    scheduler.replicas["default-0"].leases[0] = "busy"
    scheduler.replicas["default-0"].is_closing = True
    submit(scheduler, "first", now=100.0, session_id="s", determinism=SHARED)
    assert scheduler.tasks["first"].replica_id == "default-1"
    scheduler.finished("first", an_outcome(decode_ms=10_000), 110.0)
    scheduler.replicas["default-0"].leases.clear()
    scheduler.replicas["default-0"].is_closing = False
    second = submit(scheduler, "second", now=111.0, session_id="s", determinism=SHARED).task
    assert second.replica_id == "default-0"
