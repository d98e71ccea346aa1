"""The lives of workers: launch, wait until ready, notice the end. One life per Load; the core decides on the next.

Invariant: a replica has one worker at most. Whatever ends a life, its process is gone before the next one begins, so
that its device's memory is free and nothing stays behind (HP-PLC-7).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from llama_orch.engines.base import Engine, EngineError, LoadFailed, ReplicaSpec, Worker, WorkerFacts

log = logging.getLogger("llama_orch.replicas")

STOP_GRACE_S = 1.0
EXPLAIN_WAIT_S = 0.25  # a broken connection is noticed before the death of the process that broke it


@dataclass(frozen=True, slots=True)
class Listener:
    """What the owner of the replicas wants to hear."""

    ready: Callable[[str, WorkerFacts, str], None]  # replica id, facts, model digest
    lost: Callable[[str, str], None]  # replica id, reason
    explained: Callable[[str, str], None]  # replica id, the true reason of a loss that was reported before


class Replicas:
    """Workers by replica id. `digest` gives a model file's digest; it may take as long as reading the file."""

    def __init__(
        self,
        specs: dict[str, tuple[Engine, ReplicaSpec]],
        digest: Callable[[Path], Awaitable[str]],
    ) -> None:
        self._specs = specs
        self._digest = digest
        self._listener: Listener | None = None
        self._workers: dict[str, Worker] = {}
        self._condemned: dict[str, asyncio.Future[None]] = {}
        self._turns = {replica_id: asyncio.Lock() for replica_id in specs}

    def listen(self, listener: Listener) -> None:
        """Who hears of ready and lost; called once, before any life begins."""
        self._listener = listener

    def _heard(self) -> Listener:
        if self._listener is None:
            raise RuntimeError("nobody listens to the replicas")
        return self._listener

    def worker(self, replica_id: str) -> Worker | None:
        """The worker that serves now, if any."""
        return self._workers.get(replica_id)

    def condemn(self, replica_id: str, reason: str) -> None:
        """This worker cannot be trusted any more. Its loss is reported before this returns, so that nothing more is
        placed on it; its process ends soon after. Nothing when the loss is known already."""
        condemned = self._condemned.pop(replica_id, None)
        if condemned is not None:
            self._workers.pop(replica_id, None)
            self._heard().lost(replica_id, reason)
            condemned.set_result(None)

    async def live(self, replica_id: str) -> None:
        """One life, from launch to loss. The next one of the same replica waits until this one's process is gone."""
        async with self._turns[replica_id]:
            await self._one_life(replica_id)

    async def _one_life(self, replica_id: str) -> None:
        engine, spec = self._specs[replica_id]
        worker: Worker | None = None
        reason: str | None
        try:
            try:
                worker = await engine.launch(spec)
                reason = await self._serve(replica_id, spec, worker)
            except EngineError as error:
                reason = str(error)
            except Exception as error:
                # A defect in an adapter must cost one replica, not the service.
                log.exception("replica %s failed in an unforeseen way", replica_id)
                reason = f"unforeseen {type(error).__name__}"
            if reason is not None:  # before the process is gone: nothing more is to be placed on it
                self._heard().lost(replica_id, reason)
        finally:
            self._workers.pop(replica_id, None)
            self._condemned.pop(replica_id, None)
            if worker is not None:
                await self._stop(replica_id, worker)

    async def _stop(self, replica_id: str, worker: Worker) -> None:
        try:
            await worker.stop(STOP_GRACE_S)
        except Exception:
            # The same defect, seen at the end of a life: the next life must still be possible.
            log.exception("the worker of replica %s could not be stopped", replica_id)

    async def _serve(self, replica_id: str, spec: ReplicaSpec, worker: Worker) -> str | None:
        """From loading to loss; the reason of the loss, None when it was condemned and the loss is reported already."""
        digest, facts = await self._until_ready(worker, spec)
        self._workers[replica_id] = worker
        self._condemned[replica_id] = asyncio.get_running_loop().create_future()
        self._heard().ready(replica_id, facts, digest)
        return await self._until_lost(replica_id, worker, self._condemned[replica_id])

    async def _until_ready(self, worker: Worker, spec: ReplicaSpec) -> tuple[str, WorkerFacts]:
        digest = asyncio.ensure_future(self._digest(spec.model_path))  # while the worker reads the file as well
        try:
            facts = await worker.ready()
            if facts.ctx < spec.ctx:
                raise LoadFailed(
                    f"the engine grants {facts.ctx} tokens of context, not the {spec.ctx} that were asked for"
                )
            return await digest, facts
        except OSError as error:
            raise LoadFailed(f"the model file cannot be read: {error.strerror}") from error
        finally:
            digest.cancel()

    async def _until_lost(self, replica_id: str, worker: Worker, condemned: asyncio.Future[None]) -> str | None:
        lost = asyncio.ensure_future(worker.lost())
        try:
            await asyncio.wait((lost, condemned), return_when=asyncio.FIRST_COMPLETED)
            if not condemned.done():
                return lost.result()
            await asyncio.wait((lost,), timeout=EXPLAIN_WAIT_S)
            if lost.done():
                self._heard().explained(replica_id, lost.result())
            return None
        finally:
            lost.cancel()
