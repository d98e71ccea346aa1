"""The scheduler by examples. The same in general is in test_scheduler_machine.py."""

from __future__ import annotations

import pytest

from llama_orch.contract.models import Determinism, ErrorCode, Priority, ReplicaState, TaskState
from llama_orch.core import tasktable
from llama_orch.core.effects import Abort, Admitted, Effect, Ended, Forget, Load, Start
from llama_orch.core.prediction import ADVICE_MIN_MS
from llama_orch.core.replica import BACKOFF_FIRST_S, RESTARTS_MAX, SOUND_SPELL_S, Lease
from llama_orch.core.scheduler import Scheduler
from llama_orch.core.task import Task
from llama_orch.errors import (
    AdmissionReject,
    Conflict,
    DeadlineUnmet,
    DecodeTimeout,
    InvalidParams,
    NotFound,
    PoolUnavailable,
    PoolUnready,
)
from llama_orch.testing.builders import DIGEST, GIB, Host, a_host, a_pool, a_scheduler, a_task, an_outcome, submit

INTERACTIVE, BATCH = Priority.INTERACTIVE, Priority.BATCH
SHARED = Determinism.BEST_EFFORT


def busy(cards: str = "3090", **spec: object) -> Scheduler:
    """One strict task, "running", holds the only replica (or one of them); its effects were taken."""
    scheduler = a_scheduler(a_host(cards, **spec))
    submit(scheduler, "running")
    scheduler.take_effects()
    return scheduler


def state(scheduler: Scheduler, *task_ids: str) -> list[TaskState]:
    return [scheduler.tasks[task_id].state for task_id in task_ids]


def waiting(scheduler: Scheduler) -> list[str]:
    return list(scheduler.pools["default"].queue)


def code(task: Task) -> ErrorCode | None:
    return None if task.error is None else task.error.code


def give_up(scheduler: Scheduler, replica_id: str, reason: str, now: float) -> float:
    """Lose the replica, and each of its restarts, until it is given up; returns when that was."""
    for _ in range(RESTARTS_MAX):
        scheduler.replica_lost(replica_id, reason, now)
        now = max(now, scheduler.replicas[replica_id].retry_at_s or 0.0)
        scheduler.tick(now)
    scheduler.replica_lost(replica_id, reason, now)
    assert scheduler.replicas[replica_id].state is ReplicaState.FAILED
    return now


def ready(scheduler: Scheduler, replica_id: str, now: float) -> None:
    scheduler.replica_ready(replica_id, slots=4, model_digest=DIGEST, now=now)


# -- admission ---------------------------------------------------------------------------------------------------------


@pytest.mark.spec("HP-ADM-1")
def test_a_task_starts_at_once_where_there_is_room_and_waits_where_there_is_none() -> None:
    """The second strict task starts when the first one has ended."""
    scheduler = a_scheduler()
    submit(scheduler, "a")
    submit(scheduler, "b", now=1.0)
    assert scheduler.take_effects() == [Admitted("a"), Start("a"), Admitted("b")]
    scheduler.finished("a", an_outcome(), 2.0)
    assert scheduler.take_effects() == [Ended("a"), Start("b")]
    assert (scheduler.tasks["b"].created_s, scheduler.tasks["b"].started_s) == (1.0, 2.0)


@pytest.mark.spec("HP-ADM-8")
def test_the_same_id_with_the_same_body_runs_once() -> None:
    """A repeat gets the same task, has no effect, and goes on doing so after the task's end and in a drain."""
    scheduler = a_scheduler()
    first = submit(scheduler, "a", max_tokens=7)
    scheduler.take_effects()
    for step in (lambda: None, lambda: scheduler.finished("a", an_outcome(), 1.0), lambda: scheduler.drain(2.0)):
        step()
        scheduler.take_effects()
        repeat = submit(scheduler, "a", now=3.0, max_tokens=7)
        assert (repeat.is_repeat, first.is_repeat) == (True, False)
        assert repeat.task is first.task
        assert scheduler.take_effects() == []


@pytest.mark.spec("HP-ADM-8")
def test_the_same_id_with_another_body_is_a_conflict() -> None:
    """The task that has the id is left as it is."""
    scheduler = a_scheduler()
    task = submit(scheduler, "a", max_tokens=7).task
    scheduler.take_effects()
    with pytest.raises(Conflict, match="choose a new `task_id` or send the same body"):
        submit(scheduler, "a", max_tokens=8)
    assert scheduler.tasks == {"a": task}
    assert (task.max_tokens, scheduler.take_effects()) == (7, [])


@pytest.mark.spec("HP-ADM-8")
def test_an_id_is_looked_up_in_lower_case() -> None:
    """Ids are UUIDs: tasks are kept under the lower case, and a repeat in capitals finds them."""
    scheduler = a_scheduler()
    request = a_task(task_id="ABC")
    fixed = {"task_id": "abc", "seed": 1, "pool_id": "default", "prompt_tokens": [1], "correlation_id": "c"}
    first = scheduler.submit(request, are_tokens_exact=True, now=0.0, **fixed)  # type: ignore[arg-type]
    assert scheduler.repeated(request) is first.task
    assert scheduler.repeated(a_task()) is None


@pytest.mark.spec("HP-ADM-3", "HP-ERR-2")
def test_a_full_queue_refuses_and_says_how_long_to_wait() -> None:
    """429 ADMISSION_REJECT with the policy's label; nothing of the refused task is left."""
    scheduler = busy(queue_capacity=1)
    submit(scheduler, "waits")
    scheduler.take_effects()
    with pytest.raises(AdmissionReject, match=r"queue of pool default is full \(1 tasks wait\); repeat in") as caught:
        submit(scheduler, "refused", deadline_ms=1000)
    assert (caught.value.policy_label, caught.value.engine) == ("reject", "llamacpp")
    assert caught.value.headers().keys() == {"Retry-After", "X-Backoff-Ms"}
    assert "refused" not in scheduler.tasks
    assert (scheduler.take_effects(), scheduler.next_due()) == ([], None)


@pytest.mark.spec("HP-ADM-3")
def test_drop_lru_ends_the_oldest_batch_task_for_a_newcomer() -> None:
    """The victim's stream ends with QUEUE_FULL_DROP_LRU after the newcomer was admitted."""
    scheduler = busy(queue_capacity=2, full_policy="drop-lru")
    submit(scheduler, "urgent")
    submit(scheduler, "old", priority=BATCH)
    scheduler.take_effects()
    submit(scheduler, "new", priority=BATCH, now=5.0)
    assert scheduler.take_effects() == [Admitted("new"), Ended("old")]
    assert waiting(scheduler) == ["urgent", "new"]
    victim = scheduler.tasks["old"]
    assert (victim.state, code(victim), victim.ended_s) == (TaskState.FAILED, ErrorCode.QUEUE_FULL_DROP_LRU, 5.0)
    assert victim.error is not None
    assert victim.error.policy_label == "drop-lru"


@pytest.mark.spec("HP-ADM-3")
def test_drop_lru_never_drops_a_higher_priority() -> None:
    """A batch newcomer is refused where only interactive tasks wait, and an interactive one is not."""
    scheduler = busy(queue_capacity=2, full_policy="drop-lru")
    submit(scheduler, "i1")
    submit(scheduler, "i2")
    with pytest.raises(AdmissionReject) as caught:
        submit(scheduler, "b", priority=BATCH)
    assert caught.value.policy_label == "drop-lru"
    assert waiting(scheduler) == ["i1", "i2"]
    submit(scheduler, "i3")
    assert waiting(scheduler) == ["i2", "i3"]


@pytest.mark.spec("HP-ADM-1")
def test_without_a_queue_a_task_starts_or_is_refused() -> None:
    """A capacity of 0 is legal."""
    scheduler = a_scheduler(queue_capacity=0)
    submit(scheduler, "a")
    with pytest.raises(AdmissionReject):
        submit(scheduler, "b")
    assert state(scheduler, "a") == [TaskState.RUNNING]


@pytest.mark.spec("HP-ADM-7")
def test_lengths_are_checked_before_the_queue() -> None:
    """A prompt that does not fit is refused without an effect; on a bound the answer is that nobody can tell yet."""
    scheduler = a_scheduler(is_ready=False, ctx=100, max_tokens=20)
    with pytest.raises(InvalidParams):
        submit(scheduler, "a", prompt_tokens=[100])
    with pytest.raises(PoolUnready):
        submit(scheduler, "a", prompt_tokens=[100], are_tokens_exact=False)
    assert (scheduler.tasks, scheduler.take_effects()) == ({}, [])


@pytest.mark.spec("HP-ADM-7", "HP-ADM-5")
def test_a_task_admitted_on_a_bound_gets_its_count_from_the_engine() -> None:
    """A bound is not shown as the length of the prompt; the count is, once there is one."""
    scheduler = a_scheduler(is_ready=False)
    task = submit(scheduler, "a", prompt_tokens=[50, 60], are_tokens_exact=False).task
    assert (task.tokens_in, task.state) == (None, TaskState.QUEUED)
    ready(scheduler, "default-0", 2.0)
    scheduler.counted("a", 21)
    assert (task.tokens_in, task.state) == (21, TaskState.RUNNING)
    assert submit(scheduler, "b", prompt_tokens=[50, 60]).task.tokens_in == 110


@pytest.mark.spec("HP-ADM-7")
def test_a_deadline_that_cannot_be_met_is_refused() -> None:
    """Once speeds are known, a task that would start too late is refused with the figures, and no other one."""
    scheduler = a_scheduler()
    for n in range(2):
        submit(scheduler, f"sample-{n}", now=2.0 * n)
        scheduler.finished(f"sample-{n}", an_outcome(), 2.0 * n + 2.0)
    submit(scheduler, "running", now=4.0)
    scheduler.take_effects()
    with pytest.raises(
        DeadlineUnmet, match="would start in 2000 ms, after its deadline of 1999 ms; allow more"
    ) as caught:
        submit(scheduler, "late", now=4.0, deadline_ms=1999)
    assert (caught.value.policy_label, caught.value.retry_after_ms) == ("deadline", ADVICE_MIN_MS)
    assert scheduler.take_effects() == []
    assert submit(scheduler, "fine", now=4.0, deadline_ms=2001).task.state is TaskState.QUEUED


# -- order -------------------------------------------------------------------------------------------------------------


@pytest.mark.spec("HP-ADM-2", "HP-ADM-1")
def test_tasks_start_by_priority_and_then_by_arrival() -> None:
    """Interactive tasks go first, and within a priority the order of admission holds, cancels included."""
    scheduler = busy()
    for task_id, priority in [
        ("b1", BATCH),
        ("i1", INTERACTIVE),
        ("b2", BATCH),
        ("i2", INTERACTIVE),
        ("i3", INTERACTIVE),
    ]:
        submit(scheduler, task_id, priority=priority)
    scheduler.cancel("i2", 1.0)
    scheduler.take_effects()
    started = []
    current = "running"
    while scheduler.tasks[current].state is TaskState.RUNNING:
        scheduler.finished(current, an_outcome(), 2.0)
        current = next((e.task_id for e in scheduler.take_effects() if isinstance(e, Start)), current)
        started.append(current)
    assert started[:-1] == ["i1", "i3", "b1", "b2"]


@pytest.mark.spec("HP-DET-1")
def test_a_strict_task_holds_the_whole_replica_and_best_effort_tasks_share_it() -> None:
    """Four best-effort tasks run side by side; a strict one waits for all of them."""
    scheduler = a_scheduler()
    for n in range(4):
        submit(scheduler, f"shared-{n}", determinism=SHARED)
    assert [scheduler.tasks[f"shared-{n}"].lease for n in range(4)] == [Lease("default-0", (n,)) for n in range(4)]
    strict = submit(scheduler, "strict").task
    for n in range(4):
        assert strict.state is TaskState.QUEUED
        scheduler.finished(f"shared-{n}", an_outcome(), 1.0 + n)
    assert strict.lease == Lease("default-0", (0, 1, 2, 3))


@pytest.mark.spec("HP-DET-1")
def test_an_engine_that_keeps_slots_apart_shares_strict_tasks_too() -> None:
    """Only an engine that needs it gives a strict task the whole replica."""
    scheduler = a_scheduler(strict_needs_exclusive=False)
    for n in range(5):
        submit(scheduler, f"t{n}")
    assert scheduler.replicas["default-0"].slots_busy == 4
    assert waiting(scheduler) == ["t4"]


@pytest.mark.spec("HP-ADM-2")
def test_a_strict_head_is_not_overtaken_by_its_equals() -> None:
    """Best-effort tasks behind it could run at once, and would keep it waiting for ever."""
    scheduler = a_scheduler()
    submit(scheduler, "shared", determinism=SHARED)
    submit(scheduler, "strict")
    submit(scheduler, "behind", determinism=SHARED)
    assert waiting(scheduler) == ["strict", "behind"]
    scheduler.finished("shared", an_outcome(), 1.0)
    assert waiting(scheduler) == ["behind"]


@pytest.mark.spec("HP-ADM-1")
@pytest.mark.parametrize("capacity", [1, 2])
def test_an_interactive_task_passes_a_batch_task_that_cannot_start_yet(capacity: int) -> None:
    """It is ahead of every batch task, so that it takes a free slot at once, even where the queue is full."""
    scheduler = a_scheduler(queue_capacity=capacity)
    submit(scheduler, "shared", determinism=SHARED)
    submit(scheduler, "strict", priority=BATCH)
    urgent = submit(scheduler, "urgent", determinism=SHARED).task
    assert urgent.state is TaskState.RUNNING
    assert waiting(scheduler) == ["strict"]


@pytest.mark.spec("HP-ADM-3")
def test_whoever_was_held_up_by_a_dropped_head_starts() -> None:
    """A head that waits for a whole replica is dropped: the newcomer needs one slot only and finds one."""
    scheduler = a_scheduler(queue_capacity=1, full_policy="drop-lru")
    submit(scheduler, "shared", determinism=SHARED)
    submit(scheduler, "strict", priority=BATCH)
    scheduler.take_effects()
    submit(scheduler, "new", priority=BATCH, determinism=SHARED)
    assert scheduler.take_effects() == [Admitted("new"), Ended("strict"), Start("new")]


@pytest.mark.parametrize("way", ["cancel", "deadline"])
def test_whoever_was_held_up_by_a_head_that_ended_starts(way: str) -> None:
    """The end of a waiting head lets the next one try."""
    scheduler = a_scheduler()
    submit(scheduler, "shared", determinism=SHARED)
    submit(scheduler, "strict", deadline_ms=1000)
    behind = submit(scheduler, "behind", determinism=SHARED).task
    if way == "cancel":
        scheduler.cancel("strict", 1.0)
    else:
        scheduler.tick(1.0)
    assert behind.state is TaskState.RUNNING


def test_tasks_are_numbered_in_the_order_of_their_admission() -> None:
    """Lists go by these numbers: they rise, also over refusals and several pools."""
    host = a_host("3090")
    host.pools.append(a_pool("other", queue_capacity=0))
    scheduler = a_scheduler(host)
    for n, pool_id in enumerate(["default", "other", "default", "other", "default"]):
        try:
            submit(scheduler, f"t{n}", pool_id=pool_id)
        except AdmissionReject:
            assert n == 3
    numbers = [scheduler.tasks[f"t{n}"].number for n in (0, 1, 2, 4)]
    assert numbers == sorted(set(numbers))
    assert list(scheduler.tasks) == ["t0", "t1", "t2", "t4"]


def test_the_same_events_give_the_same_effects() -> None:
    """Nothing in the scheduler depends on a clock, on chance or on identity."""

    def play() -> list[Effect]:
        scheduler = a_scheduler(a_host("3090+3060"), retain_s=1.0)
        for n in range(6):
            submit(scheduler, f"t{n}", now=0.1 * n, deadline_ms=1000 + n)
        scheduler.finished("t0", an_outcome(), 0.9)
        scheduler.replica_lost("default-1", "gone", 1.0)
        for now in (1.003, 1.5, 2.5):
            scheduler.tick(now)
        return scheduler.take_effects()

    assert play() == play()


# -- placement ---------------------------------------------------------------------------------------------------------


@pytest.mark.spec("HP-PLC-1", "HP-PLC-4")
def test_two_strict_tasks_keep_both_cards_busy() -> None:
    """The first one goes to the roomier card and the second one to the other; nobody pinned a model."""
    scheduler = a_scheduler(a_host("3060+3090"))
    first, second = submit(scheduler, "a").task, submit(scheduler, "b").task
    assert (first.replica_id, second.replica_id) == ("default-1", "default-0")
    assert first.placement is not None
    assert first.placement.startswith("default-1 chosen of 2 (default-1: 24320 MiB free, 0/4 slots busy; default-0:")
    submit(scheduler, "c")
    assert waiting(scheduler) == ["c"]


@pytest.mark.spec("HP-PLC-1")
def test_what_a_card_has_free_is_what_was_seen_last() -> None:
    """Another program's memory counts as soon as the device layer has seen it."""
    scheduler = a_scheduler(a_host("3090+3060"))
    scheduler.device_seen("3090", 1 * GIB, 0.0)
    assert submit(scheduler, "a").task.replica_id == "default-1"


@pytest.mark.spec("HP-PLC-2")
def test_recommended_concurrency_is_what_runs_without_waiting() -> None:
    """Strict tasks need a replica each, or a slot each on an engine that keeps slots apart; only ready ones count."""
    shared = a_scheduler(a_host("3090+3060", strict_needs_exclusive=False)).pools["default"]
    scheduler = a_scheduler(a_host("3090+3060"))
    pool = scheduler.pools["default"]
    assert (pool.recommended_concurrency(), pool.slots_total()) == (2, 8)
    assert shared.recommended_concurrency() == 8
    scheduler.replica_lost("default-0", "gone", 1.0)
    assert (pool.recommended_concurrency(), pool.slots_total()) == (1, 4)


@pytest.mark.spec("HP-PLC-1")
def test_a_pool_is_chosen_by_readiness_and_then_by_load_per_slot() -> None:
    """Live before dead, ready before loading, then the fewest tasks for each slot, then the first in the list."""
    scheduler = a_scheduler(
        Host(a_host("3090").devices, [a_pool(name) for name in ("first", "second")]), is_ready=False
    )

    def chosen() -> str:
        return scheduler.gate.choose_pool(a_task()).spec.pool_id

    assert chosen() == "first"
    ready(scheduler, "second-0", 0.0)
    assert chosen() == "second"
    ready(scheduler, "first-0", 0.0)
    submit(scheduler, "a", pool_id="first")
    assert chosen() == "second"
    for task_id in ("b", "c", "d"):
        submit(scheduler, task_id, pool_id="second", determinism=SHARED)
    assert chosen() == "second"  # a strict task counts for all the slots that it holds: 4 of 4 against 3 of 4
    scheduler.cancel("a", 1.0)
    scheduler.released("a", 1.0)
    assert chosen() == "first"
    now = give_up(scheduler, "first-0", "bad file", 1.0)
    scheduler.replica_lost("second-0", "gone", now)
    assert chosen() == "second"


# -- ends --------------------------------------------------------------------------------------------------------------


@pytest.mark.spec("HP-ADM-4", "HP-ADM-7")
def test_a_deadline_that_passes_in_the_queue_ends_the_task() -> None:
    """It never runs, and its error says where the time went."""
    scheduler = busy()
    task = submit(scheduler, "a", now=1.0, deadline_ms=500).task
    scheduler.take_effects()
    assert scheduler.next_due() == 1.5
    scheduler.tick(1.499)
    assert task.state is TaskState.QUEUED
    scheduler.tick(1.5)
    assert scheduler.take_effects() == [Ended("a")]
    assert (task.state, code(task)) == (TaskState.FAILED, ErrorCode.DEADLINE_UNMET)
    assert "passed in the queue; allow more time" in str(task.error)
    assert waiting(scheduler) == []


@pytest.mark.spec("HP-ADM-4")
def test_a_deadline_that_passes_while_decoding_aborts_the_task() -> None:
    """Its slot stays taken until the engine has let go of it, and the next task starts only then."""
    scheduler = a_scheduler()
    task = submit(scheduler, "a", deadline_ms=1000).task
    submit(scheduler, "next")
    scheduler.take_effects()
    scheduler.tick(1.0)
    assert scheduler.take_effects() == [Abort("a"), Ended("a")]
    assert (code(task), task.lease is None) == (ErrorCode.DEADLINE_UNMET, False)
    assert "passed while decoding" in str(task.error)
    scheduler.released("a", 1.1)
    assert scheduler.take_effects() == [Start("next")]


def test_the_deadline_of_a_task_that_has_ended_means_nothing() -> None:
    """It wakes nobody up, and a later task of the same id is not measured by it."""
    scheduler = a_scheduler(retain_s=1.0)
    submit(scheduler, "a", deadline_ms=60_000)
    scheduler.finished("a", an_outcome(), 1.0)
    scheduler.tick(2.0)
    assert (scheduler.tasks, scheduler.next_due()) == ({}, None)
    again = submit(scheduler, "a", now=3.0).task
    scheduler.tick(60.0)
    assert again.state is TaskState.RUNNING


@pytest.mark.spec("HP-STR-6")
def test_canceling_a_waiting_task_ends_it_at_once() -> None:
    """There is nothing to abort. A second cancel does nothing, and an unknown task is NOT_FOUND."""
    scheduler = busy()
    task = submit(scheduler, "a").task
    scheduler.take_effects()
    for _ in range(2):
        scheduler.cancel("a", 1.0)
    assert scheduler.take_effects() == [Ended("a")]
    assert (task.state, code(task), task.ended_s) == (TaskState.CANCELED, ErrorCode.CANCELED, 1.0)
    with pytest.raises(NotFound, match=r"no task nobody; ended tasks are kept for 600 s"):
        scheduler.cancel("nobody", 1.0)


@pytest.mark.spec("HP-STR-6")
def test_canceling_a_running_task_keeps_its_slots_until_the_engine_lets_go() -> None:
    """The task has ended before its abort is performed; what the engine says of it afterwards changes nothing."""
    scheduler = busy()
    task = scheduler.tasks["running"]
    submit(scheduler, "next")
    scheduler.take_effects()
    scheduler.cancel("running", 1.0)
    assert scheduler.take_effects() == [Abort("running"), Ended("running")]
    assert (task.state, task.lease) == (TaskState.CANCELED, Lease("default-0", (0, 1, 2, 3)))
    scheduler.progressed("running", 5)
    assert (task.tokens_out, scheduler.take_effects()) == (0, [])
    scheduler.released("running", 1.2)
    scheduler.released("running", 1.3)
    assert scheduler.take_effects() == [Start("next")]


@pytest.mark.spec("HP-STR-6")
def test_a_task_that_finished_while_it_was_canceled_stays_canceled() -> None:
    """The first end counts; the slot is free all the same, and the run is not learnt from."""
    scheduler = busy()
    scheduler.cancel("running", 1.0)
    scheduler.finished("running", an_outcome(), 1.1)
    assert scheduler.tasks["running"].state is TaskState.CANCELED
    assert scheduler.tasks["running"].outcome is None
    submit(scheduler, "other", now=1.1)
    scheduler.finished("other", an_outcome(), 2.1)
    assert scheduler.predictor.tokens_per_second(scheduler.pools["default"]) is None  # one sample is not enough
    assert scheduler.is_idle


def test_an_engines_failure_ends_the_task_with_its_error() -> None:
    """Nothing is aborted, for the engine has let go already."""
    scheduler = busy()
    error = DecodeTimeout("no token for 60 s; submit the task again")
    scheduler.failed("running", error, 1.0)
    assert scheduler.take_effects() == [Ended("running")]
    assert scheduler.tasks["running"].error is error
    assert scheduler.is_idle


@pytest.mark.spec("HP-PLC-7")
def test_nobody_takes_the_place_of_a_task_whose_replica_has_stalled() -> None:
    """The task ends with its own error; who waits goes on waiting, and is not lost with the replica."""
    scheduler = busy()
    submit(scheduler, "next")
    scheduler.take_effects()
    scheduler.failed("running", DecodeTimeout("no token for 60 s"), 1.0, is_replica_sound=False)
    assert scheduler.take_effects() == [Ended("running")]
    scheduler.replica_lost("default-0", "stalled", 1.5)
    assert scheduler.take_effects() == []
    assert code(scheduler.tasks["running"]) is ErrorCode.DECODE_TIMEOUT
    assert state(scheduler, "next") == [TaskState.QUEUED]


def test_a_pools_tokens_are_those_of_its_ended_tasks() -> None:
    """Finished ones count with the engine's figures, others with what they had decoded when they ended."""
    scheduler = busy()
    scheduler.progressed("running", 3)
    scheduler.finished("running", an_outcome(tokens_in=12, tokens_out=34), 1.0)
    submit(scheduler, "b", now=1.0)
    scheduler.progressed("b", 6)
    scheduler.cancel("b", 2.0)
    scheduler.progressed("b", 100)
    pool = scheduler.pools["default"]
    assert (pool.tokens_in, pool.tokens_out) == (12 + 10, 34 + 6)


# -- replicas ----------------------------------------------------------------------------------------------------------


@pytest.mark.spec("HP-PLC-7")
def test_a_lost_replica_ends_its_own_tasks_and_no_others() -> None:
    """They end with WORKER_RESET; those on the other card run on and those in the queue wait on."""
    scheduler = a_scheduler(a_host("3090+3060"))
    for task_id in ("on-3090", "on-3060", "waits"):
        submit(scheduler, task_id)
    scheduler.take_effects()
    scheduler.replica_lost("default-0", "signal 9", 5.0)
    assert scheduler.take_effects() == [Abort("on-3090"), Ended("on-3090")]
    lost = scheduler.tasks["on-3090"]
    assert (lost.state, code(lost), lost.lease) == (TaskState.FAILED, ErrorCode.WORKER_RESET, None)
    assert "(signal 9) and is started again; submit the task again" in str(lost.error)
    assert state(scheduler, "on-3060", "waits") == [TaskState.RUNNING, TaskState.QUEUED]
    assert scheduler.replicas["default-0"].last_error == "signal 9"


@pytest.mark.spec("HP-PLC-7")
def test_every_task_of_a_lost_replica_ends_once() -> None:
    """Shared ones each, a strict one with all its slots once, and a canceled one not again."""
    scheduler = a_scheduler(a_host("3090+3060"))
    submit(scheduler, "strict")
    for task_id in ("s1", "s2", "s3"):
        submit(scheduler, task_id, determinism=SHARED)
    scheduler.cancel("s2", 1.0)
    scheduler.take_effects()
    scheduler.replica_lost("default-1", "gone", 2.0)
    assert scheduler.take_effects() == [Abort("s1"), Ended("s1"), Abort("s3"), Ended("s3")]
    scheduler.replica_lost("default-0", "gone", 2.0)
    assert scheduler.take_effects() == [Abort("strict"), Ended("strict")]
    assert scheduler.tasks["s2"].state is TaskState.CANCELED
    assert scheduler.is_idle


@pytest.mark.spec("HP-PLC-7")
@pytest.mark.parametrize("retain_s", [0.0, 600.0])
def test_late_reports_of_a_lost_replicas_tasks_do_nothing(retain_s: float) -> None:
    """The slot may have another holder by then, and the task may be forgotten."""
    scheduler = a_scheduler(retain_s=retain_s)
    submit(scheduler, "old")
    scheduler.replica_lost("default-0", "gone", 1.0)
    scheduler.tick(2.0)
    ready(scheduler, "default-0", 3.0)
    submit(scheduler, "new", now=3.0)
    scheduler.take_effects()
    scheduler.progressed("old", 1)
    scheduler.counted("old", 1)
    scheduler.finished("old", an_outcome(), 4.0)
    scheduler.failed("old", DecodeTimeout("too late"), 4.0)
    scheduler.released("old", 4.0)
    assert scheduler.take_effects() == []
    assert scheduler.tasks["new"].lease == Lease("default-0", (0, 1, 2, 3))


@pytest.mark.spec("HP-PLC-7")
def test_restarts_back_off_exponentially_and_end() -> None:
    """Half a second at first, twice as long after each loss in a row, and given up after the sixth restart."""
    scheduler = a_scheduler(is_ready=False)
    replica = scheduler.replicas["default-0"]
    now, waits = 0.0, []
    for _ in range(RESTARTS_MAX):
        scheduler.replica_lost("default-0", "out of memory", now)
        assert replica.state is ReplicaState.BACKOFF
        due = scheduler.next_due()
        assert due is not None
        waits.append(due - now)
        scheduler.tick(due - 0.001)
        assert scheduler.take_effects() == []
        scheduler.tick(due)
        assert scheduler.take_effects() == [Load("default-0")]
        assert replica.state is ReplicaState.LOADING
        now = due
    assert waits == [BACKOFF_FIRST_S * 2**n for n in range(RESTARTS_MAX)]
    scheduler.replica_lost("default-0", "out of memory", now)
    assert (replica.state, replica.restarts, scheduler.next_due()) == (ReplicaState.FAILED, RESTARTS_MAX, None)


@pytest.mark.spec("HP-PLC-7")
def test_a_sound_spell_starts_the_count_of_losses_anew() -> None:
    """A replica that served for a minute is not on its last chance; one that was ready for a moment still is."""
    scheduler = a_scheduler()
    replica = scheduler.replicas["default-0"]
    scheduler.replica_lost("default-0", "gone", 1.0)
    scheduler.tick(1.5)
    ready(scheduler, "default-0", 2.0)
    scheduler.replica_lost("default-0", "gone", 2.0 + SOUND_SPELL_S - 1)
    assert replica.losses_in_a_row == 2
    scheduler.tick(99.0)
    ready(scheduler, "default-0", 100.0)
    scheduler.replica_lost("default-0", "gone", 100.0 + SOUND_SPELL_S)
    assert replica.losses_in_a_row == 1


@pytest.mark.spec("HP-PLC-7")
def test_time_without_service_is_no_sound_spell() -> None:
    """A replica that was ready once and then fails to load, however slowly, is given up in the end."""
    scheduler = a_scheduler()
    now = 1.0
    for _ in range(RESTARTS_MAX + 1):
        scheduler.replica_lost("default-0", "load failed", now)
        now += 2 * SOUND_SPELL_S
        scheduler.tick(now)
    assert scheduler.replicas["default-0"].state is ReplicaState.FAILED


@pytest.mark.spec("HP-PLC-7", "HP-ERR-4")
def test_a_pool_without_a_replica_sends_its_queue_back() -> None:
    """Those who wait end with POOL_UNAVAILABLE, newcomers are refused with it, and the reason is in the message."""
    scheduler = a_scheduler(is_ready=False)
    task = submit(scheduler, "a", deadline_ms=60_000).task
    give_up(scheduler, "default-0", "no such file", 1.0)
    assert (task.state, code(task)) == (TaskState.FAILED, ErrorCode.POOL_UNAVAILABLE)
    with pytest.raises(PoolUnavailable, match=r"no replica left \(no such file\); mend that, then reload the pool"):
        submit(scheduler, "b")
    assert waiting(scheduler) == []


@pytest.mark.spec("HP-PLC-7")
def test_a_pool_with_one_replica_left_serves_on() -> None:
    """The queue goes to the replica that is left."""
    scheduler = a_scheduler(a_host("3090+3060"))
    now = give_up(scheduler, "default-0", "gone", 1.0)
    assert [submit(scheduler, task_id, now=now).task.replica_id for task_id in ("a", "b")] == ["default-1", None]


def test_waiting_tasks_start_when_a_replica_gets_ready() -> None:
    """As many as the engine granted slots for, which may be fewer than were asked for."""
    scheduler = a_scheduler(is_ready=False)
    for task_id in ("a", "b", "c"):
        submit(scheduler, task_id, determinism=SHARED)
    scheduler.take_effects()
    scheduler.replica_ready("default-0", slots=2, model_digest=DIGEST, now=9.0)
    assert scheduler.take_effects() == [Start("a"), Start("b")]
    assert scheduler.pools["default"].model_digest == DIGEST
    assert scheduler.pools["default"].slots_total() == 2


# -- drain -------------------------------------------------------------------------------------------------------------


@pytest.mark.spec("HP-CTL-2")
def test_a_drain_sends_back_what_waits_and_lets_finish_what_runs() -> None:
    """Newcomers and waiting tasks get POOL_UNAVAILABLE; the running one succeeds, and then all is idle."""
    scheduler = busy()
    submit(scheduler, "waits", deadline_ms=60_000)
    scheduler.take_effects()
    scheduler.drain(1.0)
    assert scheduler.take_effects() == [Ended("waits")]
    assert code(scheduler.tasks["waits"]) is ErrorCode.POOL_UNAVAILABLE
    with pytest.raises(PoolUnavailable, match="takes no new tasks; submit the task again once it is back"):
        submit(scheduler, "new")
    assert not scheduler.is_idle
    scheduler.finished("running", an_outcome(), 2.0)
    assert (state(scheduler, "running"), scheduler.is_idle) == ([TaskState.SUCCEEDED], True)


@pytest.mark.spec("HP-CTL-2")
def test_nothing_is_started_again_in_a_drain() -> None:
    """Neither a replica that waits for its restart nor one that is lost later."""
    scheduler = a_scheduler(a_host("3090+3060"))
    scheduler.replica_lost("default-0", "gone", 1.0)
    scheduler.drain(1.1)
    scheduler.replica_lost("default-1", "stopped", 1.2)
    assert {replica.state for replica in scheduler.replicas.values()} == {ReplicaState.STOPPED}
    assert scheduler.next_due() is None
    scheduler.tick(100.0)
    assert scheduler.take_effects() == []


# -- retention ---------------------------------------------------------------------------------------------------------


@pytest.mark.spec("HP-ADM-4")
def test_ended_tasks_are_kept_for_the_time_of_retention() -> None:
    """Then they are forgotten, oldest end first, and their ids are free again."""
    scheduler = a_scheduler(retain_s=10.0)
    for n in range(2):
        submit(scheduler, f"t{n}", now=float(n))
        scheduler.finished(f"t{n}", an_outcome(), n + 0.5)
    scheduler.take_effects()
    assert scheduler.next_due() == 10.5
    scheduler.tick(10.4)
    assert scheduler.known("t0").state is TaskState.SUCCEEDED
    scheduler.tick(10.5)
    assert scheduler.take_effects() == [Forget("t0")]
    with pytest.raises(NotFound):
        scheduler.known("t0")
    assert not submit(scheduler, "t0", now=10.6, max_tokens=3).is_repeat


def test_a_task_that_still_holds_a_slot_is_not_forgotten() -> None:
    """Its retention begins when the engine has let go."""
    scheduler = a_scheduler(retain_s=1.0)
    submit(scheduler, "a")
    scheduler.cancel("a", 1.0)
    scheduler.tick(100.0)
    assert "a" in scheduler.tasks
    scheduler.released("a", 100.0)
    scheduler.tick(101.0)
    assert scheduler.tasks == {}


def test_without_retention_a_task_is_forgotten_at_the_next_tick() -> None:
    """Never among the same effects as its end: whoever performs that one still has to look the task up."""
    scheduler = a_scheduler(retain_s=0.0)
    submit(scheduler, "running", deadline_ms=1000)
    submit(scheduler, "waits", deadline_ms=1000)
    scheduler.take_effects()
    scheduler.tick(1.0)
    assert scheduler.take_effects() == [Abort("running"), Ended("running"), Ended("waits")]
    assert scheduler.next_due() == 1.0
    scheduler.tick(1.0)
    assert scheduler.take_effects() == [Forget("waits")]
    scheduler.released("running", 1.5)
    scheduler.tick(1.5)
    assert (scheduler.take_effects(), scheduler.next_due()) == ([Forget("running")], None)


def test_retention_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the time of retention is, only so many ended tasks are kept, the latest ones."""
    monkeypatch.setattr(tasktable, "RETAINED_MAX", 3)
    scheduler = a_scheduler(retain_s=1e9)
    for n in range(5):
        submit(scheduler, f"t{n}", now=float(n))
        scheduler.finished(f"t{n}", an_outcome(), n + 0.5)
    assert scheduler.next_due() == 0.5  # overdue
    scheduler.tick(5.0)
    assert list(scheduler.tasks) == ["t2", "t3", "t4"]
    assert [e for e in scheduler.take_effects() if isinstance(e, Forget)] == [Forget("t0"), Forget("t1")]


def test_the_oldest_ended_task_can_be_given_up_for_room() -> None:
    """Running and waiting tasks are never given up."""
    scheduler = busy()
    submit(scheduler, "waits")
    submit(scheduler, "canceled")
    scheduler.cancel("canceled", 1.0)
    scheduler.take_effects()
    assert scheduler.forget_oldest()
    assert scheduler.take_effects() == [Forget("canceled")]
    assert not scheduler.forget_oldest()
    assert list(scheduler.tasks) == ["running", "waits"]
