"""The whole scheduler under any sequence of events, with a little model of the engines behind it.

The model performs effects as the runtime does: a Start runs until the engine reports, an Abort until it lets go, and
what a lost replica was running may report late. What the scheduler's docstring promises is checked after each event.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llama_orch.contract.models import Determinism, Priority, ReplicaState, TaskRequest, TaskState
from llama_orch.core import placement
from llama_orch.core.effects import Abort, Admitted, Ended, Forget, Load, Start
from llama_orch.core.pool import Pool
from llama_orch.core.prediction import ADVICE_MAX_MS, ADVICE_MIN_MS
from llama_orch.core.queue import PRIORITIES
from llama_orch.core.replica import Lease, Replica
from llama_orch.core.scheduler import Verdict
from llama_orch.core.task import ENDED, Task, request_digest
from llama_orch.errors import (
    AdmissionReject,
    Conflict,
    DeadlineUnmet,
    DecodeTimeout,
    LlorchError,
    PoolUnavailable,
    PoolUnready,
)
from llama_orch.testing.builders import DIGEST, GIB, Host, a_device, a_pool, a_scheduler, a_task, an_outcome, submit

POOL_IDS = ("p", "q")

POOLS = st.fixed_dictionaries(
    {
        "slots": st.sampled_from([2, 3, 1]),
        "queue_capacity": st.sampled_from([4, 6, 2, 1, 0]),
        "full_policy": st.sampled_from(["reject", "drop-lru"]),
        "strict_needs_exclusive": st.sampled_from([True, True, False]),
        "masks": st.sampled_from([[["3090"]], [["3090"], ["3060"]], [["3090", "3060"], ["3060"]]]),
    }
)
REQUESTS = st.fixed_dictionaries(
    {
        "priority": st.sampled_from(PRIORITIES),
        "determinism": st.sampled_from(Determinism),
        "deadline_ms": st.sampled_from([None, None, 1, 500, 3000, 60_000]),
        "expected_tokens": st.sampled_from([None, None, 5, 200]),
    }
)
SECONDS = st.sampled_from([0.0, 0.001, 0.25, 0.5, 1.0, 5.0, 70.0])
RARELY = st.sampled_from([False, False, False, True])
PICK = st.integers(0, 1000)  # which of those that there are, modulo their number


@dataclass
class Life:
    """What was seen of one admitted task, in order."""

    task: Task
    effects: list[str] = field(default_factory=list)
    at_end: tuple[Any, ...] | None = None

    def seen_at_end(self) -> tuple[Any, ...]:
        task = self.task
        return task.state, task.error, task.ended_s, task.tokens_in, task.tokens_out, task.outcome


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        pools=st.lists(POOLS, min_size=1, max_size=2),
        retain_s=st.sampled_from([0.0, 2.0, 600.0]),
        is_ready=st.sampled_from([True, True, True, False]),
    )
    def begin(self, pools: list[dict[str, Any]], retain_s: float, is_ready: bool) -> None:
        devices = [a_device("3090"), a_device("3060")]
        host = Host(devices, [a_pool(name, **spec) for name, spec in zip(POOL_IDS, pools, strict=False)])
        self.scheduler = a_scheduler(host, is_ready=is_ready, retain_s=retain_s)
        self.now = 0.0
        self.steps = 0
        self.running: dict[str, str] = {}  # the engines' view: task -> replica, from Start to Abort
        self.aborting: dict[str, str] = {}  # from Abort to the engine's report
        self.late: set[str] = set()  # of lost replicas, still to report
        self.ids: list[str] = []  # all that were ever submitted
        self.lives: dict[str, Life] = {}
        self.counts: Counter[str] = Counter()
        self.started: dict[tuple[str, Priority], list[int]] = {}
        self.tokens: Counter[str] = Counter()

    # -- performing effects --------------------------------------------------------------------------------------------

    def perform(self) -> int:
        """Take the effects of one event, check their order, and do what the runtime would. Returns how many."""
        effects = self.scheduler.take_effects()
        for effect in effects:
            match effect:
                case Admitted(task_id):
                    assert task_id not in self.lives, "an id is taken until it is forgotten"
                    self.lives[task_id] = Life(self.scheduler.tasks[task_id])
                    self.counts["admitted"] += 1
                case Start(task_id):
                    self.on_start(self.lives[task_id].task)
                case Abort(task_id):
                    self.on_abort(self.lives[task_id].task)
                case Ended(task_id):
                    self.on_ended(self.lives[task_id])
                case Forget(task_id):
                    self.on_forget(task_id)
                case Load(replica_id):
                    assert self.scheduler.replicas[replica_id].state is ReplicaState.LOADING
                    assert not self.scheduler.is_draining, "nothing is started in a drain"
            if not isinstance(effect, Load | Forget):
                self.lives[effect.task_id].effects.append(type(effect).__name__)
        for life in self.lives.values():
            self.check_life(life)
        return len(effects)

    def on_start(self, task: Task) -> None:
        assert self.lives[task.task_id].effects == ["Admitted"]
        assert task.replica_id is not None
        assert task.placement is not None
        waiting = [self.scheduler.tasks[task_id] for task_id in self.scheduler.pools[task.pool_id].queue]
        assert all(self.rank(task) < self.rank(other) for other in waiting), "nobody is overtaken"
        self.running[task.task_id] = task.replica_id
        self.started.setdefault((task.pool_id, task.priority), []).append(task.number)

    @staticmethod
    def rank(task: Task) -> tuple[int, int]:
        return PRIORITIES.index(task.priority), task.number

    def on_abort(self, task: Task) -> None:
        assert task.state in ENDED, "an aborted task has ended already"
        self.aborting[task.task_id] = self.running.pop(task.task_id)

    def on_ended(self, life: Life) -> None:
        assert life.at_end is None, "a task ends once"
        assert life.task.state in ENDED
        assert (life.task.error is None) is (life.task.state is TaskState.SUCCEEDED)
        life.at_end = life.seen_at_end()
        self.tokens[life.task.pool_id] += life.task.tokens_out

    def on_forget(self, task_id: str) -> None:
        life = self.lives.pop(task_id)
        assert life.effects[-1] == "Ended", "nothing comes after the end"
        assert task_id not in self.running | self.aborting, "a slot's holder is not forgotten"
        self.counts["forgotten"] += 1

    def check_life(self, life: Life) -> None:
        task, told = life.task, life.effects
        assert told in (
            ["Admitted"],
            ["Admitted", "Start"],
            ["Admitted", "Ended"],
            ["Admitted", "Start", "Ended"],
            ["Admitted", "Start", "Abort", "Ended"],
        )
        assert (task.state in ENDED) is ("Ended" in told)
        assert (task.state is TaskState.RUNNING) is (told[-1] == "Start")
        if life.at_end is not None:
            assert life.seen_at_end() == life.at_end, "an ended task never changes"

    # -- the clients ---------------------------------------------------------------------------------------------------

    @rule(fields=REQUESTS, pool=PICK)
    def submit(self, fields: dict[str, Any], pool: int) -> None:
        self.ids.append(f"t{len(self.ids)}")
        self.submit_to(self.pick_pool(pool), self.ids[-1], fields)

    @rule(several=st.lists(REQUESTS, min_size=2, max_size=4), pool=PICK)
    def submit_several(self, several: list[dict[str, Any]], pool: int) -> None:
        for fields in several:
            self.submit(fields, pool)

    @rule(pool=PICK, priorities=st.tuples(*[st.sampled_from(PRIORITIES)] * 3), deadline_ms=st.sampled_from([None, 500]))
    def submit_with_a_strict_one_between(
        self, pool: int, priorities: tuple[Priority, ...], deadline_ms: int | None
    ) -> None:
        """Where the strict one must wait for the first to end, the last could start at once."""
        for n, priority in enumerate(priorities):
            determinism = Determinism.STRICT if n == 1 else Determinism.BEST_EFFORT
            limit = deadline_ms if n == 1 else None
            fields = {"priority": priority, "determinism": determinism, "deadline_ms": limit, "expected_tokens": None}
            self.submit(fields, pool)

    @precondition(lambda self: self.ids)
    @rule(fields=REQUESTS, pool=PICK, pick=PICK, is_same=st.booleans())
    def submit_again(self, fields: dict[str, Any], pool: int, pick: int, is_same: bool) -> None:
        """An id that was used before: of a known task, with the same body or another one, or of a forgotten task."""
        task_id = self.ids[pick % len(self.ids)]
        if task_id in self.late:
            return  # the runtime's ids are not reused within the moment that an engine needs to stop
        if is_same and task_id in self.lives:
            earlier = self.lives[task_id].task.request
            fields = {name: getattr(earlier, name) for name in fields}
        self.submit_to(self.pick_pool(pool), task_id, fields)

    def pick_pool(self, pick: int) -> Pool:
        return list(self.scheduler.pools.values())[pick % len(self.scheduler.pools)]

    def submit_to(self, pool: Pool, task_id: str, fields: dict[str, Any]) -> None:
        request = a_task(task_id=task_id, **fields)
        before = set(self.scheduler.tasks), list(pool.queue)
        victim = self.victim(pool, request.priority)

        def attempt() -> Verdict:
            return submit(self.scheduler, task_id, now=self.now, pool_id=pool.spec.pool_id, **fields)

        if (known := self.lives.get(task_id)) is not None:
            if known.task.request_digest == request_digest(request):
                assert attempt().task is known.task
            else:
                with pytest.raises(Conflict):
                    attempt()
            assert self.perform() == 0
            return
        try:
            verdict = attempt()
        except LlorchError as error:
            self.check_refusal(pool, request, error)
            assert before == (set(self.scheduler.tasks), list(pool.queue)), "a refusal changes nothing"
            assert self.perform() == 0
        else:
            assert not verdict.is_repeat
            self.perform()
            if verdict.task.state is TaskState.QUEUED and len(before[1]) == pool.queue.capacity:
                assert victim is not None
                assert self.lives[victim].effects[-1] == "Ended"

    def victim(self, pool: Pool, newcomer: Priority) -> str | None:
        """Whom a newcomer may displace: the oldest of the lowest priority that waits."""
        waiting = [self.scheduler.tasks[task_id] for task_id in pool.queue]
        if pool.queue.full_policy == "reject" or not waiting:
            return None
        lowest = max((task.priority for task in waiting), key=PRIORITIES.index)
        oldest = min((task for task in waiting if task.priority is lowest), key=lambda task: task.number)
        return oldest.task_id if PRIORITIES.index(newcomer) <= PRIORITIES.index(lowest) else None

    def check_refusal(self, pool: Pool, request: TaskRequest, error: LlorchError) -> None:
        """Refusals have a reason that can be seen from outside."""
        assert error.retry_after_ms is not None
        match error:
            case PoolUnavailable():
                assert self.scheduler.is_draining or not pool.is_live
            case DeadlineUnmet():
                assert request.deadline_ms is not None
            case AdmissionReject():
                assert len(pool.queue) == pool.queue.capacity
                assert self.victim(pool, request.priority) is None
            case PoolUnready():
                assert not pool.is_ready
                assert pool.queue.capacity == 0
            case _:
                pytest.fail(f"unexpected refusal: {error!r}")

    @precondition(lambda self: self.lives)
    @rule(pick=PICK)
    def cancel(self, pick: int) -> None:
        those = [life.task for life in self.lives.values() if life.at_end is None]
        if those:
            task = those[pick % len(those)]
            self.scheduler.cancel(task.task_id, self.now)
            assert task.state is TaskState.CANCELED
            self.perform()

    @precondition(lambda self: self.lives)
    @rule(pick=PICK)
    def cancel_what_has_ended(self, pick: int) -> None:
        those = [task_id for task_id, life in self.lives.items() if life.at_end is not None]
        if those:
            self.scheduler.cancel(those[pick % len(those)], self.now)
            assert self.perform() == 0

    # -- the engines ---------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.running)
    @rule(pick=PICK, tokens=st.integers(0, 50), decode_ms=st.sampled_from([0, 100, 2000]))
    def engine_finishes(self, pick: int, tokens: int, decode_ms: int) -> None:
        task_id = self.pop(self.running, pick)
        self.scheduler.finished(task_id, an_outcome(tokens_out=tokens, decode_ms=decode_ms), self.now)
        assert self.lives[task_id].task.state is TaskState.SUCCEEDED
        self.perform()

    @precondition(lambda self: len(self.running) > 1)
    @rule(picks=st.lists(PICK, min_size=2, max_size=4))
    def engines_finish(self, picks: list[int]) -> None:
        for pick in picks:
            if self.running:
                self.engine_finishes(pick, 20, 1000)

    @precondition(lambda self: self.running)
    @rule(pick=PICK)
    def engine_fails(self, pick: int) -> None:
        task_id = self.pop(self.running, pick)
        self.scheduler.failed(task_id, DecodeTimeout("no token came"), self.now)
        assert self.lives[task_id].task.state is TaskState.FAILED
        self.perform()

    @precondition(lambda self: self.running)
    @rule(pick=PICK, is_it=RARELY)
    def engine_stalls(self, pick: int, is_it: bool) -> None:
        """Its task fails, nobody is put in the task's place, and the replica is lost right after."""
        if is_it:
            task_id = list(self.running)[pick % len(self.running)]
            replica_id = self.aborting[task_id] = self.running.pop(task_id)
            self.scheduler.failed(task_id, DecodeTimeout("no token came"), self.now, is_replica_sound=False)
            assert self.perform() == 1
            self.lose(self.scheduler.replicas[replica_id])

    @precondition(lambda self: self.aborting)
    @rule(pick=PICK, says=st.sampled_from(["released", "released", "finished", "failed"]))
    def engine_lets_go(self, pick: int, says: str) -> None:
        """It may as well have come to its end on its own before it heard of the abort."""
        self.report(self.pop(self.aborting, pick), says)
        self.perform()

    @precondition(lambda self: self.late)
    @rule(pick=PICK, says=st.sampled_from(["released", "finished", "failed"]))
    def lost_engine_reports_late(self, pick: int, says: str) -> None:
        task_id = sorted(self.late)[pick % len(self.late)]
        self.late.remove(task_id)
        self.report(task_id, says)
        assert self.perform() == 0

    def report(self, task_id: str, says: str) -> None:
        if says == "released":
            self.scheduler.released(task_id, self.now)
        elif says == "finished":
            self.scheduler.finished(task_id, an_outcome(), self.now)
        else:
            self.scheduler.failed(task_id, DecodeTimeout("no token came"), self.now)

    @precondition(lambda self: self.running or self.aborting or self.late)
    @rule(pick=PICK, tokens=st.integers(1, 10))
    def engine_progresses(self, pick: int, tokens: int) -> None:
        those = sorted({*self.running, *self.aborting, *self.late})
        task_id = those[pick % len(those)]
        self.scheduler.counted(task_id, tokens)
        self.scheduler.progressed(task_id, tokens)
        assert self.perform() == 0

    @staticmethod
    def pop(holders: dict[str, str], pick: int) -> str:
        task_id = list(holders)[pick % len(holders)]
        del holders[task_id]
        return task_id

    # -- replicas and devices ------------------------------------------------------------------------------------------

    def in_state(self, *states: ReplicaState) -> list[Replica]:
        return [replica for replica in self.scheduler.replicas.values() if replica.state in states]

    @precondition(lambda self: self.in_state(ReplicaState.LOADING))
    @rule(count=st.integers(1, 4))
    def replicas_get_ready(self, count: int) -> None:
        for replica in self.in_state(ReplicaState.LOADING)[:count]:
            self.scheduler.replica_ready(replica.replica_id, slots=replica.slots, model_digest=DIGEST, now=self.now)
            self.perform()

    @precondition(lambda self: self.in_state(ReplicaState.LOADING, ReplicaState.READY))
    @rule(pick=PICK, is_it=RARELY)
    def replica_lost(self, pick: int, is_it: bool) -> None:
        if is_it:
            alive = self.in_state(ReplicaState.LOADING, ReplicaState.READY)
            self.lose(alive[pick % len(alive)])

    def lose(self, replica: Replica) -> None:
        replica_id = replica.replica_id
        others = {task_id for task_id, held_by in self.running.items() if held_by != replica_id}
        self.scheduler.replica_lost(replica_id, "gone", self.now)
        self.perform()
        assert set(self.running) == others, "nothing else is disturbed"
        self.late |= {task_id for task_id, held_by in self.aborting.items() if held_by == replica_id}
        self.aborting = {task_id: held_by for task_id, held_by in self.aborting.items() if held_by != replica_id}

    @precondition(lambda self: self.in_state(ReplicaState.LOADING, ReplicaState.READY))
    @rule(pick=PICK, is_it=RARELY)
    def replica_is_given_up(self, pick: int, is_it: bool) -> None:
        """Its losses in a row, all at once."""
        alive = self.in_state(ReplicaState.LOADING, ReplicaState.READY)
        replica = alive[pick % len(alive)]
        while is_it and replica.state in (ReplicaState.LOADING, ReplicaState.READY):
            self.lose(replica)
            self.now = max(self.now, replica.retry_at_s or 0.0)
            self.tick()

    @rule(device=st.sampled_from(["3090", "3060"]), gib=st.integers(0, 24))
    def device_seen(self, device: str, gib: int) -> None:
        self.scheduler.device_seen(device, gib * GIB)

    # -- time ----------------------------------------------------------------------------------------------------------

    @rule(seconds=SECONDS)
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.tick()

    @precondition(lambda self: self.scheduler.next_due() is not None)
    @rule()
    def time_passes_until_something_is_due(self) -> None:
        due = self.scheduler.next_due()
        assert due is not None
        self.now = max(self.now, due)
        assert self.tick() > 0, "nobody is woken for nothing"

    def tick(self) -> int:
        self.scheduler.tick(self.now)
        count = self.perform()
        due = self.scheduler.next_due()
        assert due is None or due >= self.now, "nothing overdue is left behind"
        return count

    @precondition(lambda self: self.steps > 20)
    @rule(is_it=RARELY)
    def drain(self, is_it: bool) -> None:
        if not is_it:
            return
        running = set(self.running)
        self.scheduler.drain(self.now)
        self.perform()
        assert set(self.running) == running, "what runs may finish"

    def teardown(self) -> None:
        """However it went: once the engines are done, all has ended; once retention is over, all is forgotten."""
        if not hasattr(self, "scheduler"):
            return
        self.drain(True)
        for holders, says in ((self.running, "finished"), (self.aborting, "released")):
            while holders:
                self.report(self.pop(holders, 0), says)
                self.perform()
        assert self.scheduler.is_idle
        for replica in self.in_state(ReplicaState.LOADING, ReplicaState.READY):
            self.lose(replica)
        assert all(life.effects[-1] == "Ended" for life in self.lives.values())
        self.now += 1000.0
        self.tick()
        assert self.scheduler.tasks == self.lives == {}
        assert self.counts["admitted"] == self.counts["forgotten"]
        assert self.scheduler.next_due() is None

    # -- what always holds ---------------------------------------------------------------------------------------------

    def check_pools(self, check: Callable[[Pool], None]) -> None:
        for pool in self.scheduler.pools.values():
            check(pool)

    @invariant()
    def a_slot_has_one_holder_and_each_lease_is_in_the_ledger(self) -> None:
        held: dict[str, Lease] = {}
        for replica in self.scheduler.replicas.values():
            slots: dict[str, list[int]] = {}
            for slot, task_id in sorted(replica.leases.items()):
                assert slot in range(replica.slots)
                slots.setdefault(task_id, []).append(slot)
            assert not slots or replica.state is ReplicaState.READY
            assert replica.slots == self.scheduler.pools[replica.pool_id].spec.slots
            assert not held.keys() & slots.keys(), "no task is on two replicas"
            held |= {task_id: Lease(replica.replica_id, tuple(those)) for task_id, those in slots.items()}
        assert {task.task_id: task.lease for task in self.scheduler.tasks.values() if task.lease is not None} == held
        assert held.keys() == self.running.keys() | self.aborting.keys(), (
            "a slot is held as long as the engine is on it"
        )
        for task_id, lease in held.items():
            task = self.scheduler.tasks[task_id]
            needs_all = task.is_strict and self.scheduler.pools[task.pool_id].spec.strict_needs_exclusive
            assert len(lease.slots) == (self.scheduler.replicas[lease.replica_id].slots if needs_all else 1)

    @invariant()
    def a_queue_is_bounded_and_in_order(self) -> None:
        def check(pool: Pool) -> None:
            queue = [self.scheduler.tasks[task_id] for task_id in pool.queue]
            assert len(queue) <= pool.queue.capacity
            assert queue == sorted(queue, key=self.rank)
            everybody = [t for t in self.scheduler.tasks.values() if t.pool_id == pool.spec.pool_id]
            assert {t.task_id for t in everybody if t.state is TaskState.QUEUED} == set(pool.queue)
            assert not queue or (pool.is_live and not self.scheduler.is_draining)

        self.check_pools(check)

    @invariant()
    def within_a_priority_tasks_start_in_the_order_of_admission(self) -> None:
        assert all(numbers == sorted(set(numbers)) for numbers in self.started.values())

    @invariant()
    def no_task_is_lost(self) -> None:
        self.steps += 1
        states = Counter(task.state for task in self.scheduler.tasks.values())
        ended = sum(states[state] for state in ENDED)
        assert self.counts["admitted"] == (
            states[TaskState.QUEUED] + states[TaskState.RUNNING] + ended + self.counts["forgotten"]
        )
        assert states[TaskState.RUNNING] == len(self.running)
        assert self.scheduler.is_idle is not bool(self.running or self.aborting or states[TaskState.QUEUED])

    @invariant()
    def a_head_that_could_be_placed_does_not_wait(self) -> None:
        def check(pool: Pool) -> None:
            if (head := pool.queue.head()) is not None:
                exclusive = self.scheduler.tasks[head].is_strict and pool.spec.strict_needs_exclusive
                assert not placement.candidates(pool.replicas.values(), self.scheduler.devices, exclusive=exclusive)

        self.check_pools(check)

    @invariant()
    def predictions_are_honest(self) -> None:
        def check(pool: Pool) -> None:
            outlooks = self.scheduler.predictor.outlooks(pool, self.scheduler.tasks, self.now)
            assert [outlook.queue_position for outlook in outlooks.values()] == list(range(len(pool.queue)))
            assert list(outlooks) == list(pool.queue)
            starts = [outlook.start_in_s for outlook in outlooks.values()]
            known = [start for start in starts if start is not None]
            assert known in ([], starts), "all are known or none is"
            assert known == sorted(known)
            assert all(start >= 0 and math.isfinite(start) for start in known)
            assert not known or pool.is_ready
            advice = self.scheduler.predictor.advice_ms(pool, self.scheduler.tasks, self.now)
            assert ADVICE_MIN_MS <= advice <= ADVICE_MAX_MS
            for task_id, outlook in outlooks.items():
                self.check_chance(self.scheduler.tasks[task_id], outlook.start_in_s)

        self.check_pools(check)
        for task_id in self.running:
            self.check_chance(self.scheduler.tasks[task_id], None)

    def check_chance(self, task: Task, start_in_s: float | None) -> None:
        chance = self.scheduler.predictor.on_time(task, start_in_s, self.now)
        assert chance is None or (task.deadline_s is not None and 0.0 <= chance <= 1.0)

    @invariant()
    def tokens_are_counted_once(self) -> None:
        def check(pool: Pool) -> None:
            assert pool.tokens_out == self.tokens[pool.spec.pool_id]

        self.check_pools(check)


SchedulerMachine.TestCase.settings = settings(
    max_examples=250, stateful_step_count=50, derandomize=True, deadline=None, database=None
)


@pytest.mark.spec("HP-ADM-1", "HP-ADM-2", "HP-ADM-3", "HP-ADM-5", "HP-ADM-8", "HP-DET-1", "HP-PLC-7", "HP-STR-1")
class TestSchedulerMachine(SchedulerMachine.TestCase):
    """Any sequence of events keeps what the scheduler promises."""
