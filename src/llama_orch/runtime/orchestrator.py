"""The orchestrator: applies events to the scheduler, performs its effects, owns every asyncio task.

No `await` lies between reading the core's state and acting on it: that is the lock. Tokens do not pass through the
core; they go from the engine into the task's stream.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import suppress
from contextvars import Context
from dataclasses import replace
from typing import Any

from llama_orch.clock import Clock, new_id, new_seed
from llama_orch.context import correlation_id
from llama_orch.contract.config import Settings
from llama_orch.contract.models import MetricsFrame, ModelState, TaskRequest, TaskState
from llama_orch.core import admission, refusals
from llama_orch.core.effects import Abort, Admitted, Effect, Ended, Evict, Forget, Start
from llama_orch.core.pool import Pool
from llama_orch.core.prediction import Outlook
from llama_orch.core.scheduler import Scheduler
from llama_orch.core.task import ENDED, Task
from llama_orch.errors import Internal, LlorchError, NotFound, PoolUnready, ReplicaExhausted
from llama_orch.models.catalog import Entry
from llama_orch.observe.journal import Journal
from llama_orch.runtime import views
from llama_orch.runtime.archive import Archive
from llama_orch.runtime.arrivals import Arrivals
from llama_orch.runtime.bars import Bars
from llama_orch.runtime.builder import Builder
from llama_orch.runtime.catalog import Catalog
from llama_orch.runtime.decoding import Decoding
from llama_orch.runtime.intake import Intake, Measured, with_lower_ids
from llama_orch.runtime.keeper import Keeper
from llama_orch.runtime.on_demand import Look, Shelf
from llama_orch.runtime.replicas import Replicas
from llama_orch.runtime.streams import Reader, TaskStream

log = logging.getLogger("llama_orch.orchestrator")

FRESHEN_S = 1.0  # between two `metrics` frames of a task
RETAINED_BYTES_MAX = 128 * 2**20  # of all streams together; beyond it the oldest ended tasks are forgotten
DRAIN_LIMIT_S = 30.0  # for running tasks, once the service is told to end


class Orchestrator:
    """One scheduler at work. `run` must be running for anything to happen."""

    def __init__(
        self,
        scheduler: Scheduler,
        replicas: Replicas,
        builder: Builder,
        look: Look,
        journal: Journal,
        clock: Clock,
        settings: Settings,
        catalog: Catalog,
        archive: Archive,
    ) -> None:
        self.scheduler = scheduler
        self.replicas = replicas
        self.archive = archive
        self._journal = journal
        self._clock = clock
        self._settings = settings
        self._streams: dict[str, TaskStream] = {}
        self._intake = Intake(builder.engines, replicas, scheduler.predictor)
        self.catalog = catalog
        self.bars = Bars(catalog, scheduler, replicas, clock, self._perform_and_wake)
        self._shelf = Shelf(settings, builder, scheduler, replicas, look, catalog, self.bars)
        self._arrivals = Arrivals(settings, scheduler, catalog, self._shelf, clock, self._perform_and_wake)
        self._keeper = Keeper(
            scheduler,
            replicas,
            builder,
            journal,
            clock,
            self._spawn,
            self._perform,
            lambda: self._wake.set(),
            self.bars.loaded,
        )
        self._decoding = Decoding(
            scheduler, replicas, journal, clock, settings, self._streams, self._spawn, self._perform
        )
        self._group: asyncio.TaskGroup | None = None
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._retained_bytes = 0
        self._fresh_until = 0.0
        self.streams_open = 0
        self._looked_at = Counter[str]()  # task id -> its open streams
        self._chances: dict[str, float] = {}  # of those who wait and have a deadline, when frames were last made fresh

    # -- life --------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve until canceled: start every replica, keep time. On the way out all workers are stopped."""
        async with asyncio.TaskGroup() as group:
            self._group = group
            self.catalog.bind(self._spawn, self.bars.look_again, self._arrivals.settled)
            self.bars.begin()
            await self.catalog.begin()
            self.bars.begin()  # now that links have been followed
            self._keeper.load_configured()
            self._spawn(self._keep_time(), "time")
            try:
                await asyncio.Event().wait()
            finally:  # before the group ends its tasks: nothing may start in their place
                self.scheduler.drain(self._clock.now())
                self._cancel_all()

    def _spawn(self, coroutine: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        if self._group is None:
            raise RuntimeError("the orchestrator does not run")
        # Not in the context of whoever gave the occasion: what a worker does later is not that request's doing.
        return self._group.create_task(coroutine, name=name, context=Context())

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
            now = self._clock.now()
            waits_s = [self._keeper.look_again_s]
            if (due := self.scheduler.next_due()) is not None:
                waits_s.append(max(0.0, due - now))
            if not self.scheduler.is_idle:
                waits_s.append(max(0.0, self._fresh_until - now))
            wait_s = min((one for one in waits_s if one is not None), default=None)
            self._wake.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._wake.wait()
            self._keeper.look_at_devices()
            self.scheduler.tick(self._clock.now())
            self._perform()
            if self._clock.now() >= self._fresh_until:
                self._fresh_until = self._clock.now() + FRESHEN_S
                self._freshen()

    # -- the service's surface -----------------------------------------------------------------------------------------

    async def submit(self, request: TaskRequest) -> Task:
        """Admit a task. Raises the contract's refusals."""
        request = with_lower_ids(request)
        pool: Pool | None = None
        try:
            earlier = self.scheduler.repeated(request)
            if earlier is not None:
                return earlier
            self.archive.check(request)
            pool = await self._arrivals.pool_for(request)
            if pool is None:
                await self.bars.check(request.model_ref)
                pool = await self._pool_for(request)
            admission.check_request(request, pool.spec, self._settings.sampler_profiles)
            self.scheduler.gate.check_room(pool, request, self._clock.now())  # before it costs anything
            return self._admit(pool, request, await self._intake.measure(pool, request, self._clock.now()))
        except LlorchError as error:
            if isinstance(error, PoolUnready) and pool is not None:
                self._see_it_loaded(pool)
            self._journal.refused(request, pool, error)
            raise

    async def _pool_for(self, request: TaskRequest) -> Pool:
        """A pool that serves what the request names; one that is made for it where there is none."""
        try:
            return self.scheduler.gate.choose_pool(request)
        except NotFound as error:
            made = await self._shelf.pool_for(request, error)
        # What its engine cannot do of the request is refused as with any pool.
        return admission.matching_pools([made], request, self.scheduler.pools.values())[0]

    def _see_it_loaded(self, pool: Pool) -> None:
        """The request cannot be judged before the model is there, and will come again: it has to find it."""
        if pool is self.scheduler.pools.get(pool.spec.pool_id) and not pool.is_ready:
            self.scheduler.want(pool, self._clock.now())
            self._perform()
            self._wake.set()

    def _admit(self, pool: Pool, request: TaskRequest, measured: Measured) -> Task:
        if pool.spec.pool_id not in self.scheduler.pools:
            raise refusals.went(pool)
        bounds = admission.token_bounds(request, measured.prompts) if measured.counts is None else []
        self._keeper.look_at_devices()
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
            self._decoding.prepare(verdict.task, measured)
            self._perform()
            self._wake.set()
        return verdict.task

    def cancel(self, task_id: str) -> None:
        """Nothing is emitted for the task once this has returned, but its `error` CANCELED (HP-STR-6)."""
        self.scheduler.cancel(task_id, self._clock.now())
        self._perform()

    async def delete_session(self, session_id: str) -> None:
        """End the session. Once this has returned the engine has forgotten it, unless a task of it still runs: then it
        does so when that one ends (HP-SES-1)."""
        warmth = self.scheduler.book.delete(session_id)
        self._perform()
        self._wake.set()
        if warmth is not None:
            await self._decoding.evicted(warmth.replica_id, warmth.slot)

    def open_stream(self, task_id: str, after: int) -> Reader:
        task = self.scheduler.known(task_id)
        not_open = self.count_stream()
        self._looked_at[task_id] += 1
        if self._looked_at[task_id] == 1 and task.state not in ENDED:  # nobody has kept it fresh
            self._tell(task, self._clock.now())

        def closed() -> None:
            not_open()
            self._looked_at[task_id] -= 1
            if not self._looked_at[task_id]:
                del self._looked_at[task_id]

        return self._streams[task_id].open(after, correlation_id=correlation_id.get(), on_close=closed)

    def count_stream(self) -> Callable[[], None]:
        """One more is open, until what is returned is called, once. Raises ReplicaExhausted."""
        limit = self._settings.server.max_streams
        if self.streams_open >= limit:
            raise ReplicaExhausted(
                f"{limit} streams are open, which is the limit (`server.max_streams`); close some or repeat shortly",
                retry_after_ms=1000,
            )
        self.streams_open += 1
        return self._stream_closed

    def _stream_closed(self) -> None:
        self.streams_open -= 1

    def text(self, task_id: str) -> str:
        return self._streams[task_id].text

    def outlook(self, task: Task) -> Outlook:
        if task.state is not TaskState.QUEUED:
            return views.NOT_WAITING
        return self.scheduler.predictor.outlook(task, self.scheduler.tasks, self._clock.now())

    def now(self) -> float:
        return self._clock.now()

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

    def _perform_and_wake(self) -> None:
        self._perform()
        self._wake.set()

    def _perform_one(self, effect: Effect) -> None:
        match effect:
            case Admitted(task_id):
                self._open(self.scheduler.tasks[task_id])
            case Start(task_id):
                self._decoding.start(self.scheduler.tasks[task_id])
            case Abort(task_id):
                self._decoding.abort(self.scheduler.tasks[task_id])
            case Evict(replica_id, slot):
                self._decoding.evict(replica_id, slot)
            case Ended(task_id):
                self._end(self.scheduler.tasks[task_id])
            case Forget(task_id):
                self._retained_bytes -= self._streams.pop(task_id).size_bytes
            case _:
                self._keeper.perform(effect)

    def _open(self, task: Task) -> None:
        outlook = self.outlook(task)
        self._streams[task.task_id] = TaskStream(views.started_frame(task, outlook))
        self._journal.admitted(task, task.pool, outlook)

    def _end(self, task: Task) -> None:
        pool = task.pool
        stream = self._streams[task.task_id]
        stream.metrics(self._metrics_frame(task, views.NOT_WAITING, None))
        if task.outcome is not None and task.error is None:
            stream.end(views.end_frame(task, task.outcome, pool))
            task.outcome = replace(task.outcome, embeddings=None, scores=None)  # the stream has them
        else:
            stream.end((task.error or Internal("the task ended without a result")).body(task.correlation_id))
        self._decoding.forget(task)
        self._journal.ended(task, pool)
        self.archive.keep(task, stream)
        self._retained_bytes += stream.size_bytes
        while self._retained_bytes > RETAINED_BYTES_MAX and self.scheduler.forget_oldest():
            self._perform()

    # -- pools ---------------------------------------------------------------------------------------------------------

    def drain_pool(self, pool_id: str, deadline_ms: int) -> Pool:
        """Take no new tasks for the pool, end what is left at the deadline, unload its model (HP-CTL-2)."""
        now = self._clock.now()
        self.scheduler.drain_pool(pool_id, now + deadline_ms / 1000, now)
        self._perform()
        self._wake.set()
        return self.scheduler.pool(pool_id)

    async def reload_pool(self, pool_id: str, new_model_ref: str) -> Pool:
        """Begin to put another model in the pool's place (HP-CTL-2)."""
        built = await self._shelf.successor(pool_id, new_model_ref)
        try:
            self.scheduler.reload_pool(pool_id, built.pool, self._clock.now())
        except LlorchError:
            self._shelf.withdraw(built)
            raise
        self._perform()
        self._wake.set()
        return self.scheduler.pool(pool_id)

    # -- the catalog -------------------------------------------------------------------------------------------------

    async def put_model_in_state(self, model_id: str, state: ModelState, deadline_ms: int | None) -> Entry:
        """Retire a model, or put it back in service (HP-CTL-3). `deadline_ms`: of the tasks that it still has."""
        deadline_s = None if deadline_ms is None else self._clock.now() + deadline_ms / 1000
        entry = await self.catalog.put_in_state(model_id, state)
        self.bars.look_again(deadline_s, about=entry)
        return entry

    async def delete_model(self, model_id: str) -> None:
        file = self.catalog.file_of(await self.catalog.get(model_id))
        await self.catalog.remove(model_id, self.bars.hindrance)
        self._shelf.forget(model_id, file)
        self.bars.look_again()

    # -- time ----------------------------------------------------------------------------------------------------------

    def _freshen(self) -> None:
        """A `metrics` frame for every task that somebody looks at, while it runs or waits."""
        now = self._clock.now()
        tasks, predictor = self.scheduler.tasks, self.scheduler.predictor
        self._chances = {}
        for pool in self.scheduler.fleet.every_pool():
            self._chances |= predictor.chances(pool, tasks, now)
        for task_id in list(self._looked_at):
            task = tasks.get(task_id)
            if task is not None and task.state not in ENDED:
                self._tell(task, now)

    def _tell(self, task: Task, now: float) -> None:
        if task.state is TaskState.QUEUED:
            chance = self._chances.get(task.task_id)
        else:
            chance = self.scheduler.predictor.on_time(task.pool, task, self.scheduler.tasks, now)
        self._streams[task.task_id].metrics(self._metrics_frame(task, self.outlook(task), chance))

    def _metrics_frame(self, task: Task, outlook: Outlook, chance: float | None) -> MetricsFrame:
        left = self.scheduler.book.sessions.left(task.request.session_id)
        return views.metrics_frame(task, outlook, len(task.pool.queue), chance, left)
