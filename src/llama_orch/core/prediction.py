"""Predictions over the scheduler's state: positions, starts, chances. Reads state and changes only its own averages.

Speeds are kept for a model on a device; where a device has not been measured, what the model did elsewhere stands in.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from llama_orch.contract.models import Priority, ReplicaState, TaskState
from llama_orch.core.chance import Holder, Slot, Waiter, Work, chances, own_chance
from llama_orch.core.course import EXACT_MAX, SAMPLE, Course, Pace
from llama_orch.core.estimate import OVERDUE_SHARE, SAMPLES_MIN, WAIT_GUESS_S, Average, Lane, Lengths, Speeds
from llama_orch.core.line import Line
from llama_orch.core.pool import Pool
from llama_orch.core.queue import PRIORITIES
from llama_orch.core.replica import Replica
from llama_orch.core.task import Outcome, Task

ADVICE_MIN_MS = 100
ADVICE_MAX_MS = 300_000
MODELS_MAX = 256  # whose speeds are kept; the one measured the longest time ago is forgotten first


@dataclass(frozen=True, slots=True)
class Outlook:
    """Where a task stands. Position null once it has started; seconds from now, null when unknown."""

    queue_position: int | None
    start_in_s: float | None


class _Model:
    """What was measured of one model on one engine."""

    def __init__(self) -> None:
        self.learned = 0  # how often something was
        self.lengths = Lengths()
        self.anywhere = Speeds()
        self.on: dict[tuple[str, ...], Speeds] = {}  # by device mask
        self.load_s: dict[tuple[str, ...], Average] = {}
        self.swap_s: dict[tuple[str, ...], Average] = {}  # the wait for others to leave included

    @property
    def is_known(self) -> bool:
        return self.lengths.average.samples >= SAMPLES_MIN

    def speeds(self, mask: tuple[str, ...]) -> Speeds:
        found = self.on.get(mask)
        return found if found is not None and found.is_known else self.anywhere


class Predictor:
    """Speeds per model and device, and what follows from them for the tasks that wait."""

    def __init__(self) -> None:
        self._models: dict[tuple[str, str], _Model] = {}

    def _model(self, pool: Pool) -> _Model:
        return self._models.get(pool.spec.speed_key) or _Model()

    def _kept(self, pool: Pool) -> _Model:
        model = self._models.pop(pool.spec.speed_key, None) or _Model()
        model.learned += 1
        self._models[pool.spec.speed_key] = model
        if len(self._models) > MODELS_MAX:
            del self._models[next(iter(self._models))]
        return model

    # -- what is measured ----------------------------------------------------------------------------------------------

    def learn(
        self, pool: Pool, replica: Replica, service_s: float, outcome: Outcome, expected_tokens: int | None = None
    ) -> None:
        """One task that came to its end; `expected_tokens` is what its client had said of it."""
        model = self._kept(pool)
        decode_s = min(service_s, outcome.decode_ms / 1000)
        prefill_s = min(service_s - decode_s, outcome.prefill_ms / 1000)
        model.lengths.add(outcome.tokens_out, expected_tokens)
        for speeds in (model.anywhere, model.on.setdefault(replica.device_ids, Speeds())):
            speeds.learn(
                service_s=service_s,
                decode_s=decode_s,
                tokens_out=outcome.tokens_out,
                prefill_s=prefill_s,
                tokens_read=max(0, outcome.tokens_in - outcome.tokens_cached) if prefill_s else 0,
            )

    def learn_load(self, pool: Pool, replica: Replica, now: float) -> None:
        """The replica got ready."""
        model, mask = self._kept(pool), replica.device_ids
        model.load_s.setdefault(mask, Average()).add(now - replica.loading_since_s)
        if replica.promised_since_s is not None:
            model.swap_s.setdefault(mask, Average()).add(now - replica.promised_since_s)

    def load_s(self, pool: Pool, replica: Replica) -> float | None:
        """How long the replica takes to load, where that was measured."""
        average = self._model(pool).load_s.get(replica.device_ids)
        return None if average is None else average.mean

    def load_anywhere_s(self, pool: Pool) -> float | None:
        """The same on whatever device it was measured: most of a load is the reading of the file."""
        means = [average.mean for average in self._model(pool).load_s.values()]
        return sum(means) / len(means) if means else None

    def tokens_per_second(self, pool: Pool) -> float | None:
        model = self._model(pool)
        token_s = model.anywhere.token_s.mean
        return 1 / token_s if model.is_known and token_s > 0 else None

    # -- what follows --------------------------------------------------------------------------------------------------

    def service_s(self, pool: Pool, task: Task, replica: Replica) -> float | None:
        """Expected time of the task on the replica; None before two tasks of the model were measured."""
        model = self._model(pool)
        return self._service_s(model, task, replica.device_ids) if model.is_known else None

    def longest_s(self, pool: Pool, task: Task, tokens_in: int) -> float | None:
        """Time of the task on the slowest of the pool's replicas, should its answer be as long as it may."""
        model = self._model(pool)
        masks = {replica.device_ids for replica in pool.replicas.values()}
        if not model.is_known or not masks:
            return None
        return max(model.speeds(mask).service_s(tokens_in, task.tokens_out_max) for mask in masks)

    @staticmethod
    def _service_s(model: _Model, task: Task, mask: tuple[str, ...]) -> float:
        tokens = model.lengths.expected(task.tokens_out_max, task.request.expected_tokens)
        return model.speeds(mask).service_s(task.tokens_in or 0, tokens)

    def free_in_s(self, pool: Pool, replica: Replica, tasks: Mapping[str, Task], now: float) -> list[float]:
        """When each slot of a ready replica gets free."""
        model = self._model(pool)
        free = [0.0] * replica.slots
        for slot, task_id in replica.leases.items():
            free[slot] = self._rest_s(model, tasks[task_id], replica, now)
        return free

    def _rest_s(self, model: _Model, task: Task, replica: Replica, now: float) -> float:
        """What a running task still needs: never 0 while it runs."""
        if not model.is_known:
            return 0.001
        if task.tokens_out > 0 and task.state is TaskState.RUNNING:
            left = model.lengths.left(task.tokens_out, task.tokens_out_max, task.request.expected_tokens)
            return max(0.001, left * model.speeds(replica.device_ids).token_s.mean)
        service_s = self._service_s(model, task, replica.device_ids)
        began = now if task.started_s is None else task.started_s
        return max(began + service_s - now, OVERDUE_SHARE * service_s, 0.001)

    def backlog_s(self, pool: Pool) -> float | None:
        """How long the replicas that there are need for what waits, all tasks taken as average ones."""
        model = self._model(pool)
        serving = [r for r in pool.replicas.values() if r.state is ReplicaState.READY and not r.is_closing]
        if not model.is_known or not serving:
            return None
        mean_s = model.anywhere.service_s(0, model.lengths.average.mean)
        return len(pool.queue) * mean_s / self._lane_count(pool, serving)

    def outlook(self, task: Task, tasks: Mapping[str, Task], now: float) -> Outlook:
        """Of a task that waits in its pool."""
        return Outlook(task.pool.queue.place(task.task_id), self._start_s(task.pool, task, tasks, now))

    def newcomer_wait_s(self, pool: Pool, newcomer: Task, tasks: Mapping[str, Task], now: float) -> float | None:
        """Seconds until a task that is not queued yet would start."""
        ahead = sum(pool.queue.depth(one) for one in PRIORITIES[: PRIORITIES.index(newcomer.priority) + 1])
        course = self._course(pool, newcomer.priority, tasks, now)
        if course is None:
            return 0.0 if ahead == 0 and self._is_free_now(pool, tasks, now) else None
        if ahead >= EXACT_MAX:
            return course.left_s(self._far_s(pool, course, ahead, tasks, now), now)
        return course.left_s(course.next_start_s(exclusive=self._is_exclusive(pool, newcomer)), now)

    def advice_ms(self, pool: Pool, tasks: Mapping[str, Task], now: float) -> int:
        """When somebody who is not there finds room: when the head of the queue will leave it, or without one a slot
        gets free; behind those who have a turn (HP-ERR-2). Gives no turn."""
        return to_advice_ms(self.place_in_s(pool, tasks, now, pool.turns.ahead(now)))

    def place_in_s(self, pool: Pool, tasks: Mapping[str, Task], now: float, ahead: int) -> float:
        """Seconds until a place in the queue gets free for one who lets `ahead` others go first: when that many more
        than one have left it. Those who are still to come into it are taken to be like those who wait in it."""
        waiting = min(len(pool.queue), ahead + 1)
        if waiting:
            last_s = self._start_s(pool, tasks[pool.queue.at(waiting - 1)], tasks, now)
        else:
            last_s = self._slot_wait_s(pool, tasks, now)
        to_come = ahead + 1 - max(1, waiting)
        interval_s = self._interval_s(pool, tasks) if to_come else 0.0
        if last_s is None or interval_s is None:
            return self._guess_s(pool, tasks, now) * (1 + (len(pool.queue) + ahead) / max(1, pool.slots_total()))
        return last_s + to_come * interval_s

    def _interval_s(self, pool: Pool, tasks: Mapping[str, Task]) -> float | None:
        """Between two starts of the tasks that wait, on the replicas that serve or will; None where it is not known."""
        model = self._model(pool)
        if not model.is_known or not pool.is_coming:
            return None
        if waiting := [tasks[task_id] for task_id in pool.queue.sample(SAMPLE)]:
            return self._mean_interval_s(pool, waiting)
        coming = [replica for replica in pool.replicas.values() if replica.is_coming]
        return model.anywhere.service_s(0, model.lengths.average.mean) / self._lane_count(pool, coming)

    def _mean_interval_s(self, pool: Pool, waiting: Sequence[Task]) -> float:
        """Their work over the lanes that serve it or will, of which there are some."""
        model = self._model(pool)
        coming = [replica for replica in pool.replicas.values() if replica.is_coming]
        replicas, slots, total_s = len(coming), sum(replica.slots for replica in coming), 0.0
        for task in waiting:
            total_s += self._service_s(model, task, ()) / (replicas if self._is_exclusive(pool, task) else slots)
        return total_s / len(waiting)

    @staticmethod
    def _lane_count(pool: Pool, replicas: Sequence[Replica]) -> int:
        return sum(1 if pool.spec.strict_needs_exclusive else replica.slots for replica in replicas)

    @staticmethod
    def _guess_s(pool: Pool, tasks: Mapping[str, Task], now: float) -> float:
        """Of one task before any was measured: what the oldest that runs will have taken, if it is half done; less
        where the tokens that it has, and those that it may have, tell that it is further."""
        guesses = [WAIT_GUESS_S]
        for replica in pool.replicas.values():
            for task_id in replica.leases.values():
                task = tasks[task_id]
                if task.started_s is not None:
                    done = max(0.5, task.tokens_out / max(1, task.tokens_out_max))
                    guesses.append((now - task.started_s) / done)
        return max(guesses)

    def ready_advice_ms(self, pool: Pool, now: float) -> int:
        """When to ask again for a pool without a ready replica: when the load is expected to be over; where that is not
        known, a load takes as long again as it has taken so far."""
        waits = [] if not pool.is_arriving else [WAIT_GUESS_S if pool.arrival_s is None else pool.arrival_s - now]
        for replica in pool.replicas.values():
            known_s = self.load_s(pool, replica)
            if replica.state is ReplicaState.LOADING:
                so_far_s = now - replica.loading_since_s
                waits.append(so_far_s if known_s is None else _left(replica.loading_since_s, known_s, now))
            elif replica.retry_at_s is not None:
                waits.append(replica.retry_at_s - now)
            elif replica.state in (ReplicaState.UNLOADED, ReplicaState.UNLOADING) and known_s is not None:
                waits.append(known_s)
        return to_advice_ms(min(waits, default=0.0))

    def on_time(self, pool: Pool, task: Task, tasks: Mapping[str, Task], now: float) -> float | None:
        """Chance that the task meets its deadline; None without one, once it has ended, or before anything was measured
        that it depends on."""
        model = self._model(pool)
        if task.deadline_s is None or not model.is_known:
            return None
        if task.state is TaskState.RUNNING and (replica := pool.replicas.get(task.replica_id or "")) is not None:
            return own_chance(self._holder(model, task, replica, now))
        return self.chances(pool, tasks, now).get(task.task_id) if task.state is TaskState.QUEUED else None

    def chances(self, pool: Pool, tasks: Mapping[str, Task], now: float) -> dict[str, float]:
        """The same of those who wait in the pool, in one pass; those that have a deadline. Nothing is said of who has
        EXACT_MAX or more ahead."""
        model = self._model(pool)
        waiting = [tasks[task_id] for task_id in pool.queue.first(EXACT_MAX)]
        if not model.is_known or all(task.deadline_s is None for task in waiting):
            return {}
        serving, lanes = self._lanes(pool, tasks, now)
        if not lanes:
            return {}
        slots: list[list[Slot]] = []
        for replica, lane in zip(serving, lanes, strict=True):
            holders = {
                slot: self._holder(model, tasks[task_id], replica, now)
                for slot, task_id in replica.leases.items()
                if tasks[task_id].state is TaskState.RUNNING
            }
            slots.append([holders.get(slot, free_in_s) for slot, free_in_s in enumerate(lane.free_in_s)])
        masks = [replica.device_ids for replica in serving]
        waiters = [
            Waiter(
                task.number,
                self._is_exclusive(pool, task),
                [self._work(model, task, mask) for mask in masks],
                None if task.deadline_s is None else task.deadline_s - now,
            )
            for task in waiting
        ]
        found = zip(waiting, chances(slots, waiters), strict=True)
        return {task.task_id: chance for task, chance in found if task.deadline_s is not None}

    @staticmethod
    def _work(model: _Model, task: Task, mask: tuple[str, ...], spent_s: float = 0.0) -> Work:
        """What the task may need of a replica there, less the time that it has spent on one without a token."""
        speeds, is_decoding = model.speeds(mask), task.tokens_out > 0
        fixed_s = 0.0 if is_decoding else max(0.0, speeds.service_s(task.tokens_in or 0, 0) - spent_s)
        options = model.lengths.options(task.tokens_out, task.tokens_out_max, task.request.expected_tokens)
        return Work(fixed_s, [tokens * speeds.token_s.mean for tokens in options], speeds.deviation)

    def _holder(self, model: _Model, task: Task, replica: Replica, now: float) -> Holder:
        spent_s = 0.0 if task.started_s is None else now - task.started_s
        left_s = None if task.deadline_s is None else task.deadline_s - now
        return Holder(task.number, self._work(model, task, replica.device_ids, spent_s), left_s)

    @staticmethod
    def _is_exclusive(pool: Pool, task: Task) -> bool:
        return task.is_strict and pool.spec.strict_needs_exclusive

    def _start_s(self, pool: Pool, task: Task, tasks: Mapping[str, Task], now: float) -> float | None:
        """Seconds until a task that waits starts."""
        course = self._course(pool, task.priority, tasks, now)
        if course is None:  # a lone task in front of an idle replica starts at once, whatever the speeds are
            return 0.0 if len(pool.queue) == 1 and self._is_free_now(pool, tasks, now) else None
        start_s = course.starts_s.get(task.task_id)
        if start_s is None:
            start_s = self._far_s(pool, course, pool.queue.place(task.task_id), tasks, now)
        return course.left_s(start_s, now)

    def _far_s(self, pool: Pool, course: Course, ahead: int, tasks: Mapping[str, Task], now: float) -> float:
        """The start of one who has so many ahead, more than are played."""
        if pool.pace is None or not pool.pace.is_of_use(len(pool.queue), now):
            some = pool.queue.first(EXACT_MAX), pool.queue.sample(SAMPLE)
            near_s, all_s = (self._mean_interval_s(pool, [tasks[one] for one in ids]) for ids in some)
            pool.pace = Pace(now, len(pool.queue), all_s / near_s if near_s else 1.0)
        # What is lost between unlike tasks, when slots are kept free for a strict one, is in the starts alone.
        return course.earliest_s + (ahead - EXACT_MAX + 1) * course.interval_s() * pool.pace.factor

    def _course(self, pool: Pool, last: Priority, tasks: Mapping[str, Task], now: float) -> Course | None:
        """Of those who wait, up to this priority. None where nothing is known."""
        model = self._model(pool)
        if not model.is_known or not pool.is_coming:
            return None
        key: Hashable = model.learned, tuple(replica.occupation() for replica in pool.replicas.values())
        before: Course | None = None
        for priority in PRIORITIES[: PRIORITIES.index(last) + 1]:
            line = pool.queue.lines[priority]
            key = key, line.removals
            course = pool.courses.get(priority)
            if course is None or not course.is_of_use(key, now):
                course = Course(key, now, *self._lanes(pool, tasks, now)) if before is None else before.branch(key)
                pool.courses[priority] = course
            if not course.lanes:
                return None
            self._play_on(pool, course, line, tasks)
            key, before = (key, course.at_s, course.played), course
        return before

    def _play_on(self, pool: Pool, course: Course, line: Line, tasks: Mapping[str, Task]) -> None:
        """Those of the line who have come since, as far as it is played."""
        room = EXACT_MAX - len(course.starts_s)
        if course.played == len(line) or not room:
            return
        model, strict_needs_exclusive = self._model(pool), pool.spec.strict_needs_exclusive
        rates = [model.speeds(replica.device_ids).rates_s() for replica in course.replicas]
        for task_id in line.some(course.played, course.played + room):
            task = tasks[task_id]
            tokens_in = task.tokens_in or 0
            tokens_out = model.lengths.expected(task.tokens_out_max, task.request.expected_tokens)
            services_s = [fixed_s + tokens_in * in_s + tokens_out * out_s for fixed_s, in_s, out_s in rates]
            course.play(task_id, services_s, exclusive=strict_needs_exclusive and task.is_strict)

    def _slot_wait_s(self, pool: Pool, tasks: Mapping[str, Task], now: float) -> float | None:
        _, lanes = self._lanes(pool, tasks, now)
        wait_s = min((lane.start(exclusive=False) for lane in lanes), default=None)
        return wait_s if self._model(pool).is_known or wait_s == 0 else None

    def _is_free_now(self, pool: Pool, tasks: Mapping[str, Task], now: float) -> bool:
        return any(max(lane.free_in_s) == 0 for lane in self._lanes(pool, tasks, now)[1])

    def _lanes(self, pool: Pool, tasks: Mapping[str, Task], now: float) -> tuple[list[Replica], list[Lane]]:
        """The replicas that serve, and those that come at a time that is known."""
        serving: list[Replica] = []
        lanes: list[Lane] = []
        for replica in pool.replicas.values():
            if replica.state is ReplicaState.READY and not replica.is_closing:
                free_in_s = self.free_in_s(pool, replica, tasks, now)
            elif (ready_in_s := self._ready_in_s(pool, replica, now)) is not None:
                free_in_s = [ready_in_s] * replica.slots
            else:
                continue
            lanes.append(Lane(free_in_s, len(serving)))
            serving.append(replica)
        return serving, lanes

    def _ready_in_s(self, pool: Pool, replica: Replica, now: float) -> float | None:
        """When a replica that loads, or is about to, will serve; None where its load was never measured."""
        if replica.state is ReplicaState.LOADING and not replica.is_launched:
            swap = self._model(pool).swap_s.get(replica.device_ids)
            return None if swap is None else _left(replica.loading_since_s, swap.mean, now)
        load_s = self.load_s(pool, replica)
        if load_s is None:
            return None
        if replica.state is ReplicaState.LOADING:
            return _left(replica.loading_since_s, load_s, now)
        if replica.state is ReplicaState.BACKOFF and replica.retry_at_s is not None:
            return max(0.0, replica.retry_at_s - now) + load_s
        return None


def _left(since_s: float, mean_s: float, now: float) -> float:
    """Of what began then and takes this long."""
    return max(since_s + mean_s - now, OVERDUE_SHARE * mean_s)


def to_advice_ms(wait_s: float) -> int:
    """Within bounds: nobody is asked to come at once, nor sent away for longer than five minutes."""
    return min(ADVICE_MAX_MS, max(ADVICE_MIN_MS, round(wait_s * 1000)))
