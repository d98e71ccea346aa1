"""Tasks that name a model from elsewhere whose file is not here yet (`on_demand.fetch`): it is fetched for them, and
they wait for it in the queue of a pool that gets its replicas once the file is there (HP-PLC-8).

A fetch belongs to the catalog's model and to no task: all tasks of the model share it, and it goes on when they are
canceled. One that fails ends all that wait for it, with its own error.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from typing import NamedTuple

from msgspec import structs

from llama_orch.clock import Clock
from llama_orch.contract.config import Settings
from llama_orch.contract.models import CatalogModelRequest, TaskRequest
from llama_orch.core import refusals
from llama_orch.core.pool import Pool
from llama_orch.core.scheduler import Scheduler
from llama_orch.errors import Internal, LlorchError, PolicyDenied, UntrustedArtifact
from llama_orch.models import trust
from llama_orch.models.catalog import Entry
from llama_orch.policy.urls import without_query
from llama_orch.runtime.catalog import Catalog
from llama_orch.runtime.on_demand import Shelf, answer_to


class Arriving(NamedTuple):
    """A pool, and the first request for it, without its texts."""

    pool: Pool
    request: TaskRequest


class Arrivals:
    """Over one scheduler and catalog. `perform` is called after each event."""

    def __init__(
        self,
        settings: Settings,
        scheduler: Scheduler,
        catalog: Catalog,
        shelf: Shelf,
        clock: Clock,
        perform: Callable[[], None],
    ) -> None:
        self._is_on = settings.on_demand.enabled and settings.on_demand.fetch
        self._scheduler = scheduler
        self._catalog = catalog
        self._shelf = shelf
        self._clock = clock
        self._perform = perform
        self._arriving: dict[str, list[Arriving]] = {}  # by catalog id

    async def pool_for(self, request: TaskRequest) -> Pool | None:
        """The pool in whose queue the task waits for its model's file; None where there is no file to wait for. Raises
        PolicyDenied, UntrustedArtifact, InvalidParams, and whatever keeps a model out of the catalog."""
        if not self._is_on:
            return None
        entry = self._catalog.book.find(request.model_ref)
        if entry is None:
            entry = await self._entered(request.model_ref)
        if entry is None or not entry.is_absent or entry.is_retired:
            return None
        if problems := trust.lacks(entry.declared, self._catalog.policy):
            raise UntrustedArtifact(f"model {entry.id!r} is not trusted: {'; '.join(problems)}")
        if self._catalog.fetches is None or not self._catalog.fetches.is_under_way(entry):
            entry = await self._catalog.fetch(entry.id)
        if not entry.is_absent:
            return None
        pool = self._pool_of(entry, request)
        self._foresee(entry, pool)
        return pool

    async def _entered(self, reference: str) -> Entry | None:
        """A model that nobody has entered is entered by its reference, if it may be fetched at all."""
        if not reference.startswith(("hf:", "https:")):
            return None
        declared = CatalogModelRequest(id=_id_for(reference), source_url=reference)
        if problems := trust.lacks(declared, self._catalog.policy):
            told = without_query(reference)
            raise UntrustedArtifact(f"{told!r} is not in the catalog, and not trusted: {'; '.join(problems)}")
        if self._catalog.fetches is None:
            raise PolicyDenied("this service keeps no files from elsewhere")
        await self._catalog.fetches.check(reference)
        entry, _ = await self._catalog.create(declared)
        return entry

    def _pool_of(self, entry: Entry, request: TaskRequest) -> Pool:
        """One that waits for the same file and does for the request, under whatever name; else a new one."""
        pools = self._scheduler.pools
        known = [one for one in self._arriving.get(entry.id, ()) if pools.get(one.pool.spec.pool_id) is one.pool]
        for pool in (one.pool for one in known):
            if request.engine in (None, pool.spec.engine) and (request.ctx or 0) <= pool.spec.ctx:
                answer_to(pool, request.model_ref)
                return pool
        pool = self._shelf.arriving(request, entry)
        bare = structs.replace(request, prompt=None, inputs=None, messages=None)
        self._arriving[entry.id] = [*known, Arriving(pool, bare)]
        return pool

    def _foresee(self, entry: Entry, pool: Pool) -> None:
        """For those who are told to come again."""
        fetch = None if self._catalog.fetches is None else self._catalog.fetches.of(entry)
        left_s = None if fetch is None else fetch.left_s()
        pool.arrival_s = None if left_s is None else self._clock.now() + left_s

    # -- what becomes of it --------------------------------------------------------------------------------------------

    async def settled(self, entry: Entry, error: LlorchError | None) -> None:
        """The file is there, or does not come (`error`)."""
        for one in self._arriving.pop(entry.id, []):
            outcome: LlorchError | None = Internal("the pool of the model could not be made, which is a defect")
            try:
                outcome = error or await self._arrived(one)
            finally:  # whatever happens, nobody waits for ever
                if outcome is not None:
                    self._failed(one.pool, refusals.not_arrived(one.pool, outcome))
                self._perform()

    async def _arrived(self, one: Arriving) -> LlorchError | None:
        """The wait is over, and the load begins; or why the model cannot be served."""
        pool = one.pool
        waiting = [self._scheduler.tasks[task_id].request.workload for task_id in pool.queue]
        request = structs.replace(one.request, workload=waiting[0]) if waiting else one.request
        try:
            built = await self._shelf.arrived(pool, structs.replace(request, model_ref=pool.spec.model))
        except LlorchError as failure:
            return failure
        if built is not None:
            self._scheduler.arrivals.came(pool, built.pool.spec, built.pool.replicas, self._clock.now())
        return None

    def _failed(self, pool: Pool, error: LlorchError) -> None:
        self._scheduler.arrivals.failed(pool, error, self._clock.now())
        self._shelf.withdraw_arriving(pool)


def _id_for(reference: str) -> str:
    """A catalog id that says what it is, and is that reference's alone."""
    kind, _, rest = without_query(reference).partition(":")
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", rest).strip("-._")[-40:]
    return f"{kind}-{name}-{hashlib.sha256(reference.encode()).hexdigest()[:8]}"
