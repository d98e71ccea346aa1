"""The orchestrator: applies events to the scheduler, performs its effects, owns every asyncio task.

No `await` lies between reading the core's state and acting on it: that is the lock. Tokens do not pass through the
core; they go from the engine into the task's stream.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from msgspec import structs

from llama_orch.clock import Clock, new_id, new_seed
from llama_orch.context import correlation_id
from llama_orch.contract.config import Settings
from llama_orch.contract.models import MetricsFrame, ReplicaState, TaskRequest, TaskState
from llama_orch.core import admission
from llama_orch.core.effects import Abort, Admitted, Effect, Ended, Forget, Load, Start
from llama_orch.core.pool import Pool
from llama_orch.core.prediction import Outlook
from llama_orch.core.scheduler import Scheduler
from llama_orch.core.task import ENDED, Outcome, Task
from llama_orch.devices.inventory import Source
from llama_orch.engines.base import DecodeStalled, EngineBusy, JobRefused, WorkerFacts, WorkerLost
from llama_orch.errors import (
    DecodeTimeout,
    Internal,
    InvalidParams,
    LlorchError,
    ReplicaExhausted,
)
from llama_orch.observe.journal import Journal
from llama_orch.runtime import jobs, views
from llama_orch.runtime.intake import Intake, Measured
from llama_orch.runtime.replicas import Listener, Replicas
from llama_orch.runtime.streams import Reader, TaskStream

log = logging.getLogger("llama_orch.orchestrator")

DEVICES_FRESH_S = 0.25
FRESHEN_S = 1.0  # between two `metrics` frames of a task
RETAINED_BYTES_MAX = 128 * 2**20  # of all streams together; beyond it the oldest ended tasks are forgotten
DRAIN_LIMIT_S = 30.0  # for running tasks, once the service is told to end


class Running(NamedTuple):
    """A task and the asyncio task that decodes it."""

    task: Task
    job: asyncio.Task[None]


class Orchestrator:
    """One scheduler at work. `run` must be running for anything to happen."""

    def __init__(
        self,
        scheduler: Scheduler,
        replicas: Replicas,
        journal: Journal,
        clock: Clock,
        settings: Settings,
        sources: Sequence[Source],
    ) -> None:
        self.scheduler = scheduler
        self.replicas = replicas
        self._journal = journal
        self._clock = clock
        self._settings = settings
        self._sources = sources
        self._streams: dict[str, TaskStream] = {}
        self._intake = Intake(replicas, scheduler.predictor)
        # By task number, not by task id: an id may come again while the job of its forgotten task still winds down.
        self._prompts: dict[int, Sequence[str]] = {}
        self._jobs: dict[int, Running] = {}
        self._group: asyncio.TaskGroup | None = None
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._retained_bytes = 0
        self._fresh_until = 0.0
        self._devices_fresh_until = 0.0
        self.streams_open = 0
        replicas.listen(Listener(self._replica_ready, self._replica_lost, self.scheduler.replica_explained))

    # -- life --------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve until canceled: start every replica, keep time. On the way out all workers are stopped."""
        async with asyncio.TaskGroup() as group:
            self._group = group
            loading = [r.replica_id for r in self.scheduler.replicas.values() if r.state is ReplicaState.LOADING]
            for replica_id in loading:
                self._spawn(self.replicas.live(replica_id), f"replica {replica_id}")
            self._spawn(self._keep_time(), "time")
            try:
                await asyncio.Event().wait()
            finally:  # before the group ends its tasks: nothing may start in their place
                self.scheduler.drain(self._clock.now())
                self._cancel_all()

    def _spawn(self, coroutine: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        if self._group is None:
            raise RuntimeError("the orchestrator does not run")
        return self._group.create_task(coroutine, name=name)

    async def drain(self) -> None:
        """Take no more tasks and wait for the running ones, at most DRAIN_LIMIT_S; then cancel the rest."""
        self.scheduler.drain(self._clock.now())
        self._perform()
        with suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_LIMIT_S):
                while not self.scheduler.is_idle:
                    self._idle.clear()
                    await self._idle.wait()
        self._cancel_all()

    def _cancel_all(self) -> None:
        self.scheduler.cancel_all(self._clock.now())
        self._perform()

    async def _keep_time(self) -> None:
        """Deadlines, restarts and retention when they are due; `metrics` frames every second while tasks are about."""
        while True:
            due = self.scheduler.next_due()
            wait_s = None if due is None else max(0.0, due - self._clock.now())
            if not self.scheduler.is_idle:
                fresh_s = max(0.0, self._fresh_until - self._clock.now())
                wait_s = fresh_s if wait_s is None else min(fresh_s, wait_s)
            self._wake.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._wake.wait()
            self._look_at_devices()
            self.scheduler.tick(self._clock.now())
            self._perform()
            if self._clock.now() >= self._fresh_until:
                self._fresh_until = self._clock.now() + FRESHEN_S
                self._freshen()

    def _look_at_devices(self) -> None:
        """What is free on each device, for placement. A device that cannot be read keeps its last figure."""
        if self._clock.now() < self._devices_fresh_until:
            return
        self._devices_fresh_until = self._clock.now() + DEVICES_FRESH_S
        for source in self._sources:
            try:
                self.scheduler.device_seen(source.device.device_id, source.read_free_bytes())
            except OSError as error:  # no descriptor left, for example: no reason to end the service
                log.warning("device %s could not be read: %s", source.device.device_id, error)

    # -- the service's surface -----------------------------------------------------------------------------------------

    async def submit(self, request: TaskRequest) -> Task:
        """Admit a task. Raises the contract's refusals."""
        request = _with_lower_ids(request)
        pool: Pool | None = None
        try:
            earlier = self.scheduler.repeated(request)
            if earlier is not None:
                return earlier
            pool = self.scheduler.choose_pool(request)
            admission.check_request(request, pool.spec, self._settings.sampler_profiles)
            self.scheduler.check_room(pool, request.priority, self._clock.now())  # before anything is spent on it
            return self._admit(pool, request, await self._intake.measure(pool, request, self._clock.now()))
        except LlorchError as error:
            self._journal.refused(request, pool, error)
            raise

    def _admit(self, pool: Pool, request: TaskRequest, measured: Measured) -> Task:
        bounds = [admission.token_bound(prompt) for prompt in measured.prompts] if measured.counts is None else []
        self._look_at_devices()
        verdict = self.scheduler.submit(
            request,
            task_id=request.task_id or new_id(),
            seed=new_seed() if request.seed is None else request.seed,
            pool_id=pool.spec.pool_id,
            prompt_tokens=bounds if measured.counts is None else measured.counts,
            are_tokens_exact=measured.counts is not None,
            correlation_id=correlation_id.get(),
            now=self._clock.now(),
        )
        if not verdict.is_repeat:
            self._prompts[verdict.task.number] = measured.prompts
            self._perform()
            self._wake.set()
        return verdict.task

    def cancel(self, task_id: str) -> None:
        """Nothing is emitted for the task once this has returned, but its `error` CANCELED (HP-STR-6)."""
        self.scheduler.cancel(task_id, self._clock.now())
        self._perform()

    def open_stream(self, task_id: str, after: int) -> Reader:
        self.scheduler.known(task_id)
        limit = self._settings.server.max_streams
        if self.streams_open >= limit:
            raise ReplicaExhausted(
                f"{limit} streams are open, which is the limit (`server.max_streams`); close some or repeat shortly",
                retry_after_ms=1000,
            )
        self.streams_open += 1
        return self._streams[task_id].open(after, correlation_id=correlation_id.get(), on_close=self._stream_closed)

    def _stream_closed(self) -> None:
        self.streams_open -= 1

    def text(self, task_id: str) -> str:
        return self._streams[task_id].text

    def outlook(self, task: Task) -> Outlook:
        if task.state is not TaskState.QUEUED:
            return views.NOT_WAITING
        pool = self.scheduler.pools[task.pool_id]
        return self.scheduler.predictor.outlooks(pool, self.scheduler.tasks, self._clock.now())[task.task_id]

    def wall(self, seconds: float) -> float:
        """Seconds of the scheduler's clock -> seconds since the epoch."""
        return self._clock.wall() - self._clock.now() + seconds

    def backoff_ms(self, pool: Pool) -> int:
        """What a well-behaved client waits before it submits more: nothing while the queue has room."""
        if len(pool.queue) < pool.queue.capacity or pool.queue.capacity == 0:
            return 0
        return self.scheduler.predictor.advice_ms(pool, self.scheduler.tasks, self._clock.now())

    # -- effects -------------------------------------------------------------------------------------------------------

    def _perform(self) -> None:
        for effect in self.scheduler.take_effects():
            self._perform_one(effect)
        if self.scheduler.is_idle:
            self._idle.set()

    def _perform_one(self, effect: Effect) -> None:
        match effect:
            case Admitted(task_id):
                self._open(self.scheduler.tasks[task_id])
            case Start(task_id):
                self._start(self.scheduler.tasks[task_id])
            case Abort(task_id):
                running = self._jobs.get(self.scheduler.tasks[task_id].number)
                if running is not None:  # it may have found the loss by itself
                    running.job.cancel()
            case Ended(task_id):
                self._end(self.scheduler.tasks[task_id])
            case Forget(task_id):
                self._retained_bytes -= self._streams.pop(task_id).size_bytes
            case Load(replica_id):
                self._spawn(self.replicas.live(replica_id), f"replica {replica_id}")

    def _open(self, task: Task) -> None:
        outlook = self.outlook(task)
        self._streams[task.task_id] = TaskStream(views.started_frame(task, outlook))
        self._journal.admitted(task, self.scheduler.pools[task.pool_id], outlook)

    def _start(self, task: Task) -> None:
        self._journal.started(task, self.scheduler.pools[task.pool_id], self._clock.now())
        job = self._spawn(self._run_task(task), f"task {task.task_id}")
        self._jobs[task.number] = Running(task, job)
        # Not in the job itself: a job that is canceled before its first step runs none of its code.
        job.add_done_callback(lambda _: self._job_over(task))

    def _job_over(self, task: Task) -> None:
        del self._jobs[task.number]
        if task.state in ENDED and self.scheduler.tasks.get(task.task_id) is task:
            self.scheduler.released(task.task_id, self._clock.now())
        self._perform()

    def _end(self, task: Task) -> None:
        pool = self.scheduler.pools[task.pool_id]
        stream = self._streams[task.task_id]
        stream.metrics(self._metrics_frame(task, views.NOT_WAITING))
        if task.outcome is not None and task.error is None:
            stream.end(views.end_frame(task, task.outcome, pool))
        else:
            stream.end((task.error or Internal("the task ended without a result")).body(task.correlation_id))
        self._prompts.pop(task.number, None)
        self._journal.ended(task, pool)
        self._retained_bytes += stream.size_bytes
        while self._retained_bytes > RETAINED_BYTES_MAX and self.scheduler.forget_oldest():
            self._perform()

    # -- decoding ------------------------------------------------------------------------------------------------------

    async def _run_task(self, task: Task) -> None:
        """One task on its slot, whatever happens."""
        correlation_id.set(task.correlation_id)
        replica_id = task.replica_id or ""
        try:
            outcome = await self._decode(task, replica_id)
        except asyncio.CancelledError:
            if task.state not in ENDED:  # not ours: something else ends the service
                raise
        except WorkerLost as error:
            self.replicas.condemn(replica_id, str(error))  # its loss ends the task
        except DecodeStalled as error:
            timeout = DecodeTimeout(f"{error}; submit the task again", engine=self._engine(task), retry_after_ms=1000)
            self.scheduler.failed(task.task_id, timeout, self._clock.now(), is_replica_sound=False)
            self.replicas.condemn(replica_id, str(error))
        except JobRefused as error:
            refusal = InvalidParams(str(error), engine=self._engine(task))
            self.scheduler.failed(task.task_id, refusal, self._clock.now())
        except EngineBusy as error:
            busy = ReplicaExhausted(f"{error}; submit the task again", engine=self._engine(task), retry_after_ms=1000)
            self.scheduler.failed(task.task_id, busy, self._clock.now())
        except Exception:
            # A defect of ours must end its task in its stream, not only in the log.
            log.exception("task %s failed in an unforeseen way", task.task_id)
            internal = Internal("the task failed inside the service; the log has the correlation ID")
            self.scheduler.failed(task.task_id, internal, self._clock.now())
        else:
            self.scheduler.finished(task.task_id, outcome, self._clock.now())
        self._perform()

    async def _decode(self, task: Task, replica_id: str) -> Outcome:
        worker = self.replicas.worker(replica_id)
        if worker is None:
            raise WorkerLost("the worker was gone before decoding began")
        pool = self.scheduler.pools[task.pool_id]
        version = task.request.sampler_profile_version or pool.spec.sampler_profile_version
        prompts = self._prompts[task.number]
        if task.tokens_in is None:  # admitted on a bound, while the model was loading
            self.scheduler.counted(task.task_id, sum([await worker.count_tokens(prompt) for prompt in prompts]))
        given = jobs.Assignment(
            worker=worker,
            prompts=prompts,
            sampling=jobs.sampling_of(task.request, self._settings.sampler_profiles[version]),
            idle_timeout_s=self._settings.tasks.decode_idle_timeout_ms / 1000,
        )

        def progressed(tokens: int) -> None:
            if task.tokens_out == 0:
                self._journal.first_token(task, pool, self._clock.now())
            self.scheduler.progressed(task.task_id, tokens)
            self._journal.decoded(pool, replica_id, tokens)

        return await jobs.decode(task, given, self._streams[task.task_id], progressed)

    def _engine(self, task: Task) -> str:
        return self.scheduler.pools[task.pool_id].spec.engine

    # -- replicas and time ---------------------------------------------------------------------------------------------

    def _replica_ready(self, replica_id: str, facts: WorkerFacts, digest: str) -> None:
        self.scheduler.replica_ready(replica_id, slots=facts.slots, model_digest=digest, now=self._clock.now())
        replica = self.scheduler.replicas[replica_id]
        pool = self.scheduler.pools[replica.pool_id]
        self._journal.replica_ready(replica, pool, facts.load_ms, dict(facts.buffer_bytes))
        self._perform()

    def _replica_lost(self, replica_id: str, reason: str) -> None:
        now = self._clock.now()
        self.scheduler.replica_lost(replica_id, reason, now)
        replica = self.scheduler.replicas[replica_id]
        self._journal.replica_lost(replica, self.scheduler.pools[replica.pool_id], reason, now)
        self._perform()
        self._wake.set()

    def _freshen(self) -> None:
        """A `metrics` frame for every task that runs or waits."""
        now = self._clock.now()
        for pool in self.scheduler.pools.values():
            outlooks = self.scheduler.predictor.outlooks(pool, self.scheduler.tasks, now) if len(pool.queue) else {}
            for task_id, outlook in outlooks.items():
                self._streams[task_id].metrics(self._metrics_frame(self.scheduler.tasks[task_id], outlook))
        for running in self._jobs.values():
            if running.task.state not in ENDED:
                self._streams[running.task.task_id].metrics(self._metrics_frame(running.task, views.NOT_WAITING))

    def _metrics_frame(self, task: Task, outlook: Outlook) -> MetricsFrame:
        depth = len(self.scheduler.pools[task.pool_id].queue)
        chance = self.scheduler.predictor.on_time(task, outlook.start_in_s, self._clock.now())
        return views.metrics_frame(task, outlook, depth, chance)


def _with_lower_ids(request: TaskRequest) -> TaskRequest:
    """A UUID is the same in either case of its letters, and so is what it names."""
    ids = {name: value.lower() for name in ("task_id", "session_id") if (value := getattr(request, name)) is not None}
    return structs.replace(request, **ids) if ids else request
