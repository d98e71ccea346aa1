"""The lives of workers: launch, wait until ready, notice the end. One life per Load; the core decides on the next.

Invariant: a replica has one worker at most. Whatever ends a life, its process is gone before the next one begins, so
that its device's memory is free and nothing stays behind (HP-PLC-7).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llama_orch.engines.base import Engine, EngineError, LoadFailed, OutOfMemory, ReplicaSpec, Worker, WorkerFacts
from llama_orch.runtime.measure import process_tree

log = logging.getLogger("llama_orch.replicas")

STOP_GRACE_S = 1.0
EXPLAIN_WAIT_S = 0.25  # a broken connection is noticed before the death of the process that broke it


@dataclass(frozen=True, slots=True)
class Listener:
    """What the owner of the replicas wants to hear."""

    ready: Callable[[str, WorkerFacts, str | None], None]  # replica id, facts, model digest (None of one elsewhere)
    lost: Callable[[str, str, bool], None]  # replica id, reason, whether its devices lacked memory
    explained: Callable[[str, str], None]  # replica id, the true reason of a loss that was reported before
    unloaded: Callable[[str], None]  # replica id: its worker is gone as it was told
    gone: Callable[[str], None]  # replica id: the process of a lost worker has ended
    memory_back: Callable[[str], Awaitable[None]]  # waits until a replica's memory was seen to return


class Replicas:
    """Workers by replica id. `digest` gives a model file's digest; it may take as long as reading the file."""

    def __init__(
        self,
        specs: dict[str, tuple[Engine, ReplicaSpec]],
        digest: Callable[[Path], Awaitable[str]],
    ) -> None:
        self._specs = dict(specs)
        self._digest = digest
        self._listener: Listener | None = None
        self._workers: dict[str, Worker] = {}
        self._condemned: dict[str, asyncio.Future[None]] = {}
        self._told: dict[str, asyncio.Future[None]] = {}  # set: the life is to end
        self._turns: dict[str, asyncio.Lock] = {}
        self._pids: dict[str, tuple[int, ...]] = {}
        self._builds: dict[str, str] = {}  # engine -> the version that its first worker reported

    def listen(self, listener: Listener) -> None:
        """Who hears of what happens; called once, before any life begins."""
        self._listener = listener

    def _heard(self) -> Listener:
        if self._listener is None:
            raise RuntimeError("nobody listens to the replicas")
        return self._listener

    def add(self, specs: dict[str, tuple[Engine, ReplicaSpec]]) -> None:
        """More replicas, which nothing is known of yet."""
        self._specs |= specs

    def resize(self, replica_id: str, slots: int) -> None:
        """Its next life has this many slots."""
        engine, spec = self._specs[replica_id]
        self._specs[replica_id] = (engine, replace(spec, slots=slots))

    def discard(self, replica_id: str) -> None:
        """It will not be loaded again. A life that is ending ends."""
        del self._specs[replica_id]
        self._turns.pop(replica_id, None)
        self._told.pop(replica_id, None)
        self._pids.pop(replica_id, None)

    def spec(self, replica_id: str) -> ReplicaSpec:
        return self._specs[replica_id][1]

    def worker(self, replica_id: str) -> Worker | None:
        """The worker that serves now, if any."""
        return self._workers.get(replica_id)

    def pids(self, replica_id: str) -> tuple[int, ...]:
        """The processes of the worker that serves now."""
        return self._pids.get(replica_id, ()) if replica_id in self._workers else ()

    def condemn(self, replica_id: str, reason: str, *, is_shortage: bool = False) -> None:
        """This worker cannot be trusted any more. Its loss is reported before this returns, so that nothing more is
        placed on it; its process ends soon after. Nothing when the loss is known already."""
        condemned = self._condemned.pop(replica_id, None)
        if condemned is not None:
            self._workers.pop(replica_id, None)
            self._heard().lost(replica_id, reason, is_shortage)
            condemned.set_result(None)

    def unload(self, replica_id: str) -> None:
        """End the life that is under way. Once its process is gone and its memory is back, `unloaded` is reported, and
        nothing else of this life is."""
        self._workers.pop(replica_id, None)
        self._condemned.pop(replica_id, None)
        told = self._told[replica_id]
        if not told.done():
            told.set_result(None)

    def live(self, replica_id: str) -> Coroutine[Any, Any, None]:
        """One life, from launch to end. The next one of the same replica waits until this one's process is gone."""
        told = self._told[replica_id] = asyncio.get_running_loop().create_future()
        return self._live(replica_id, told)

    async def _live(self, replica_id: str, told: asyncio.Future[None]) -> None:
        async with self._turns.setdefault(replica_id, asyncio.Lock()):
            await self._one_life(replica_id, told)

    async def _one_life(self, replica_id: str, told: asyncio.Future[None]) -> None:
        engine, spec = self._specs[replica_id]
        worker: Worker | None = None
        reason: str | None
        is_shortage = False
        try:
            try:
                worker = await engine.launch(spec)
                reason = await self._serve(replica_id, spec, worker, told)
            except EngineError as error:
                reason, is_shortage = str(error), isinstance(error, OutOfMemory)
            except Exception as error:
                # A defect in an adapter must cost one replica, not the service.
                log.exception("replica %s failed in an unforeseen way", replica_id)
                reason = f"unforeseen {type(error).__name__}"
            if reason is not None and not told.done():
                # Before the process is gone: nothing more is to be placed on it.
                self._heard().lost(replica_id, reason, is_shortage)
        finally:
            self._workers.pop(replica_id, None)
            self._condemned.pop(replica_id, None)
            if worker is not None:
                await self._stop(replica_id, worker)
        if told.done():
            self._heard().unloaded(replica_id)
        else:
            self._heard().gone(replica_id)

    async def _stop(self, replica_id: str, worker: Worker) -> None:
        try:
            await worker.stop(STOP_GRACE_S)
            await self._heard().memory_back(replica_id)
        except Exception:
            # The same defect, seen at the end of a life: the next life must still be possible.
            log.exception("the worker of replica %s could not be stopped", replica_id)

    async def _serve(
        self, replica_id: str, spec: ReplicaSpec, worker: Worker, told: asyncio.Future[None]
    ) -> str | None:
        """From loading to loss; the reason of the loss, None when it was told to end, or was condemned, and its loss is
        reported already."""
        loading = asyncio.ensure_future(self._until_ready(replica_id, worker, spec))
        try:
            await asyncio.wait((loading, told), return_when=asyncio.FIRST_COMPLETED)
            if told.done():
                return None
            digest, facts = loading.result()
        finally:
            loading.cancel()
            await asyncio.wait((loading,))
            if not loading.cancelled():
                loading.exception()  # has been raised, or belongs to a life that was told to end
        self._workers[replica_id] = worker
        self._pids[replica_id] = () if facts.pid is None else tuple(process_tree(facts.pid))
        condemned = self._condemned[replica_id] = asyncio.get_running_loop().create_future()
        self._heard().ready(replica_id, facts, digest)
        return await self._until_lost(replica_id, worker, condemned, told)

    async def _until_ready(self, replica_id: str, worker: Worker, spec: ReplicaSpec) -> tuple[str | None, WorkerFacts]:
        if spec.model_path is None:  # what is loaded elsewhere, and how, is the server's to say
            return None, await worker.ready()
        digest = asyncio.ensure_future(self._digest(spec.model_path))  # while the worker reads the file as well
        try:
            facts = await worker.ready()
            if facts.ctx < spec.ctx:
                raise LoadFailed(
                    f"the engine grants {facts.ctx} tokens of context, not the {spec.ctx} that were asked for"
                )
            self._check_build(replica_id, facts.engine_version)
            return await digest, facts
        except OSError as error:
            raise LoadFailed(f"the model file cannot be read: {error.strerror}") from error
        finally:
            digest.cancel()

    def _check_build(self, replica_id: str, version: str) -> None:
        """One build of an engine for as long as the service lives (HP-DET-2): one that was upgraded underneath must not
        serve under the version that capabilities and `end` name."""
        pinned = self._builds.setdefault(self._specs[replica_id][0].traits.name, version)
        if version != pinned:
            raise LoadFailed(
                f"the engine was replaced: it is {version} now, and this service began with {pinned}; "
                "restart the service"
            )

    async def _until_lost(
        self, replica_id: str, worker: Worker, condemned: asyncio.Future[None], told: asyncio.Future[None]
    ) -> str | None:
        lost = asyncio.ensure_future(worker.lost())
        try:
            await asyncio.wait((lost, condemned, told), return_when=asyncio.FIRST_COMPLETED)
            if told.done():
                return None
            if not condemned.done():
                return lost.result()
            await asyncio.wait((lost,), timeout=EXPLAIN_WAIT_S)
            if lost.done():
                self._heard().explained(replica_id, lost.result())
            return None
        finally:
            lost.cancel()
