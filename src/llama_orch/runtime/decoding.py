"""The tasks that decode now: one asyncio task for each, from its Start to the moment that its slot is free."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, NamedTuple

from llama_orch.clock import Clock
from llama_orch.context import correlation_id
from llama_orch.contract.config import Settings
from llama_orch.core import refusals
from llama_orch.core.scheduler import Scheduler
from llama_orch.core.task import ENDED, Outcome, Task
from llama_orch.engines.base import DecodeStalled, EngineBusy, EngineError, JobRefused, RunLost, RunStalled, WorkerLost
from llama_orch.errors import DecodeTimeout, Internal, InvalidParams, ReplicaExhausted
from llama_orch.observe.journal import Journal
from llama_orch.runtime import intake, jobs
from llama_orch.runtime.replicas import Replicas
from llama_orch.runtime.streams import TaskStream

log = logging.getLogger("llama_orch.decoding")

Spawn = Callable[[Coroutine[Any, Any, None], str], asyncio.Task[None]]


class Running(NamedTuple):
    """A task and the asyncio task that decodes it."""

    task: Task
    job: asyncio.Task[None]


class Decoding:
    """Reports to the scheduler; `perform` is called after each report. `streams` are the orchestrator's own."""

    def __init__(
        self,
        scheduler: Scheduler,
        replicas: Replicas,
        journal: Journal,
        clock: Clock,
        settings: Settings,
        streams: Mapping[str, TaskStream],
        spawn: Spawn,
        perform: Callable[[], None],
    ) -> None:
        self._scheduler = scheduler
        self._replicas = replicas
        self._journal = journal
        self._clock = clock
        self._settings = settings
        self._streams = streams
        self._spawn = spawn
        self._perform = perform
        # By task number, not by task id: an id may come again while the job of its forgotten task still winds down.
        self._measured: dict[int, intake.Measured] = {}
        self._jobs: dict[int, Running] = {}
        self._evictions: dict[tuple[str, int], asyncio.Task[None]] = {}  # by replica and slot

    def prepare(self, task: Task, measured: intake.Measured) -> None:
        """What the task will decode, as the engine is to see it."""
        self._measured[task.number] = measured

    def forget(self, task: Task) -> None:
        """The task has ended: its prompts may be megabytes."""
        self._measured.pop(task.number, None)

    def running(self) -> list[Task]:
        return [running.task for running in self._jobs.values() if running.task.state not in ENDED]

    def start(self, task: Task) -> None:
        self._journal.started(task, task.pool, self._clock.now())
        job = self._spawn(self._run_task(task), f"task {task.task_id}")
        self._jobs[task.number] = Running(task, job)
        # Not in the job itself: a job that is canceled before its first step runs none of its code.
        job.add_done_callback(lambda _: self._job_over(task))

    def abort(self, task: Task) -> None:
        """Stop decoding. Nothing where the job has found the loss by itself."""
        running = self._jobs.get(task.number)
        if running is not None:
            running.job.cancel()

    def evict(self, replica_id: str, slot: int) -> None:
        """Have the engine forget what the idle slot holds. Whoever starts there next waits for it."""
        eviction = self._spawn(self._evict(replica_id, slot), f"evict {replica_id} slot {slot}")
        self._evictions[replica_id, slot] = eviction
        eviction.add_done_callback(lambda done: self._eviction_over(replica_id, slot, done))

    def _eviction_over(self, replica_id: str, slot: int, eviction: asyncio.Task[None]) -> None:
        if self._evictions.get((replica_id, slot)) is eviction:
            del self._evictions[replica_id, slot]

    async def evicted(self, replica_id: str, slot: int) -> None:
        """Return once nothing is being forgotten there."""
        if (eviction := self._evictions.get((replica_id, slot))) is not None:
            await asyncio.wait((eviction,))

    async def _evict(self, replica_id: str, slot: int) -> None:
        if (worker := self._replicas.worker(replica_id)) is None:
            return  # its process is gone, and all that it held
        try:
            await worker.evict(slot)
        except WorkerLost as error:
            self._replicas.condemn(replica_id, str(error))
            self._perform()
        except EngineError as error:
            log.warning("slot %d of replica %s could not be cleared: %s", slot, replica_id, error)

    def _job_over(self, task: Task) -> None:
        del self._jobs[task.number]
        if task.state in ENDED and self._scheduler.tasks.get(task.task_id) is task:
            self._scheduler.released(task.task_id, self._clock.now())
        self._perform()

    async def _run_task(self, task: Task) -> None:
        """One task on its slot, whatever happens."""
        correlation_id.set(task.correlation_id)
        replica_id = task.replica_id or ""
        engine = task.pool.spec.engine
        try:
            outcome = await self._decode(task, replica_id)
        except asyncio.CancelledError:
            if task.state not in ENDED:  # not ours: something else ends the service
                raise
        except WorkerLost as error:
            self._replicas.condemn(replica_id, str(error))  # its loss ends the task
        except RunStalled as error:
            timeout = DecodeTimeout(f"{error}; submit the task again", engine=engine, retry_after_ms=1000)
            self._scheduler.failed(task.task_id, timeout, self._clock.now())
        except RunLost as error:
            lost = refusals.reset(task.pool, replica_id, str(error))
            self._scheduler.failed(task.task_id, lost, self._clock.now())
        except DecodeStalled as error:
            timeout = DecodeTimeout(f"{error}; submit the task again", engine=engine, retry_after_ms=1000)
            self._scheduler.failed(task.task_id, timeout, self._clock.now(), is_replica_sound=False)
            self._replicas.condemn(replica_id, str(error))
        except JobRefused as error:
            self._scheduler.failed(task.task_id, InvalidParams(str(error), engine=engine), self._clock.now())
        except EngineBusy as error:
            busy = ReplicaExhausted(f"{error}; submit the task again", engine=engine, retry_after_ms=1000)
            self._scheduler.failed(task.task_id, busy, self._clock.now())
        except Exception:
            # A defect of ours must end its task in its stream, not only in the log.
            log.exception("task %s failed in an unforeseen way", task.task_id)
            internal = Internal("the task failed inside the service; the log has the correlation ID")
            self._scheduler.failed(task.task_id, internal, self._clock.now())
        else:
            self._scheduler.finished(task.task_id, outcome, self._clock.now())
        self._perform()

    async def _decode(self, task: Task, replica_id: str) -> Outcome:
        if task.lease is not None:
            await self.evicted(replica_id, task.lease.slots[0])
        worker = self._replicas.worker(replica_id)
        if worker is None:
            raise WorkerLost("the worker was gone before decoding began")
        version = task.request.sampler_profile_version or task.pool.spec.sampler_profile_version
        measured = self._measured[task.number]
        if task.tokens_in is None:  # admitted on a bound, while the model was loading
            counts = await intake.count(worker, task.request, measured.prompts)
            self._scheduler.counted(task.task_id, sum(counts))
        given = jobs.Assignment(
            worker=worker,
            prompts=measured.prompts,
            sampling=jobs.sampling_of(task.request, self._settings.sampler_profiles[version], measured.grammar),
            idle_timeout_s=self._settings.tasks.decode_idle_timeout_ms / 1000,
        )

        def progressed(tokens: int) -> None:
            if task.tokens_out == 0:
                self._journal.first_token(task, task.pool, self._clock.now())
            self._scheduler.progressed(task.task_id, tokens)
            self._journal.decoded(task.pool, replica_id, tokens)

        return await jobs.decode(task, given, self._streams[task.task_id], progressed)
