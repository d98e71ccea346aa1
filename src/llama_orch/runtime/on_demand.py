"""Models that tasks and reloads name: which of them may be named, and pools for those that no pool serves (HP-PLC-8).

A task may name what is built in, and files below `catalog.file_roots`; whoever holds the token is not thereby let into
the rest of the disk. Whether a file is there is not told of paths outside of the roots.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Awaitable, Callable
from dataclasses import replace
from itertools import chain, count
from pathlib import Path

from msgspec import structs

from llama_orch.contract.config import PoolSettings, Settings
from llama_orch.contract.models import ReplicaState, TaskRequest
from llama_orch.core.pool import Pool
from llama_orch.core.scheduler import Scheduler
from llama_orch.errors import InvalidParams, LlorchError, NotFound, ReplicaExhausted
from llama_orch.models.catalog import Entry
from llama_orch.models.references import ModelNotFound
from llama_orch.policy.urls import without_query
from llama_orch.runtime.bars import Bars
from llama_orch.runtime.builder import Builder, Built, Draft, Room, offer_for
from llama_orch.runtime.catalog import Catalog
from llama_orch.runtime.library import Model
from llama_orch.runtime.plan import empty_room, model_problem, seat_alone
from llama_orch.runtime.replicas import Replicas

ALIASES_MAX = 16  # names of one file that a pool answers to
POOLS_MAX = 64  # on demand, loaded or not
CTX_AUTO_MAX = 8192  # where neither task nor model ask for less; tokens per slot
CTX_AUTO_MIN = 2048  # below this an automatic context is not lowered to make a model fit
_ENGINES = ("llamacpp", "ctransformers", "simulated")  # the first one that takes the model

Look = Callable[[str], Awaitable[Model]]


class Shelf:
    """What may be named, and the pools that are made of it. `look` finds a model without holding up the event loop."""

    def __init__(
        self,
        settings: Settings,
        builder: Builder,
        scheduler: Scheduler,
        replicas: Replicas,
        look: Look,
        catalog: Catalog,
        bars: Bars,
    ) -> None:
        self._settings = settings
        self._builder = builder
        self._scheduler = scheduler
        self._replicas = replicas
        self._look = look
        self._pool_settings = {pool.id: pool for pool in settings.pools}
        self._catalog = catalog
        self._bars = bars

    # -- a pool for a task ---------------------------------------------------------------------------------------------

    async def pool_for(self, request: TaskRequest, refusal: LlorchError) -> Pool:
        """A pool on demand for a task that no pool can take; `refusal` where there can be none."""
        if not self._may_be_named(request.model_ref):
            raise refusal
        entry = self._catalog.book.find(request.model_ref)
        try:
            model = await self._look(_own_name(request, entry))
        except ModelNotFound as error:
            raise NotFound(str(error)) from error
        if (known := self._known(model, request)) is not None:
            return known
        if not self._settings.on_demand.enabled:
            raise refusal
        self._bars.check_file(request.model_ref, model.path)
        draft = self._draft(model, request)
        built = self._builder.build(draft, state=ReplicaState.UNLOADED, is_on_demand=True)
        self._make_room()
        self._replicas.add(built.workers)
        self._scheduler.fleet.add(built.pool)
        self._pool_settings[draft.settings.id] = draft.settings
        answer_to(built.pool, request.model_ref)
        return built.pool

    # -- a pool for a model whose file is still to come ----------------------------------------------------------------

    def arriving(self, request: TaskRequest, entry: Entry) -> Pool:
        """A pool in whose queue the task can wait. Of its model nothing is known yet: who names no context is promised
        the least that an automatic one is lowered to. Raises InvalidParams, ReplicaExhausted."""
        names = self._engine_names(request)
        if not names:
            raise self._not_served(request, [])
        name = _own_name(request, entry)
        model = Model(name, Path(name), None, lambda ctx, slots, backend: None)
        settings = self._settings_for(names[0], model, request.ctx or CTX_AUTO_MIN)
        self._make_room()
        pool = self._builder.arriving(settings, model)
        answer_to(pool, request.model_ref)
        self._scheduler.fleet.add(pool)
        self._pool_settings[settings.id] = settings
        return pool

    async def arrived(self, pool: Pool, request: TaskRequest) -> Built | None:
        """The replicas of such a pool, now that the file is there; None where the pool has gone. Raises what keeps its
        model from being served."""
        try:
            model = await self._look(pool.spec.model)
        except ModelNotFound as error:
            raise NotFound(str(error)) from error
        if not any(one is pool for one in self._scheduler.fleet.every_pool()):
            return None
        self._bars.check_file(pool.spec.model, model.path)
        draft = self._draft(model, request)
        draft.settings = structs.replace(draft.settings, id=pool.spec.pool_id)
        built = self._builder.build(draft, state=ReplicaState.UNLOADED, is_on_demand=True)
        built.pool.spec = replace(built.pool.spec, aliases=pool.spec.aliases)
        self._replicas.add(built.workers)
        self._pool_settings[draft.settings.id] = draft.settings
        return built

    def withdraw_arriving(self, pool: Pool) -> None:
        """Its file does not come."""
        if pool.spec.pool_id not in self._scheduler.pools:
            self._pool_settings.pop(pool.spec.pool_id, None)

    def _may_be_named(self, reference: str) -> bool:
        entry = self._catalog.book.find(reference)
        if entry is not None:
            return self._catalog.may_be_named(entry.source)
        kind, _, rest = reference.partition(":")
        return self._catalog.roots.admit(Path(rest)) if kind == "file" else self._builder.library.is_open(reference)

    def _known(self, model: Model, request: TaskRequest) -> Pool | None:
        """A pool that has the same file under another name; it answers to this name from now on."""
        for pool in self._scheduler.pools.values():
            is_able = request.engine in (None, pool.spec.engine) and (request.ctx or 0) <= pool.spec.ctx
            if is_able and model.path in self._paths(pool):
                answer_to(pool, request.model_ref)
                return pool
        return None

    def _paths(self, pool: Pool) -> set[Path | None]:
        return {self._replicas.spec(replica_id).model_path for replica_id in pool.replicas}

    def _draft(self, model: Model, request: TaskRequest) -> Draft:
        """The first engine that takes the model, with as much context as was asked for or as fits."""
        problems = []
        for name in self._engine_names(request):
            ctx = request.ctx or self._ctx_auto(model)
            problem = model_problem(self._builder.engines[name], model, ctx)
            if problem is None and request.workload not in offer_for(self._builder.engines[name], model).workloads:
                problem = f"it cannot do workload {request.workload.value!r} with this model"
            if problem is None:
                return self._seated(name, model, ctx, is_ctx_asked=request.ctx is not None)
            problems.append(f"{name}: {problem}")
        raise self._not_served(request, problems)

    def _engine_names(self, request: TaskRequest) -> list[str]:
        """Those that the task lets choose from."""
        return [name for name in self._all_engine_names() if request.engine in (None, name)]

    def _all_engine_names(self) -> list[str]:
        """A simulated one is for a rehearsal only, where there is no other."""
        names = [name for name in _ENGINES if name in self._builder.engines]
        return names if len(names) == 1 else [name for name in names if name != "simulated"]

    def _not_served(self, request: TaskRequest, problems: list[str]) -> InvalidParams:
        known = ", ".join(self._all_engine_names())
        given = "; ".join(problems) or f"there is no engine {request.engine!r}; there are: {known}"
        return InvalidParams(f"{without_query(request.model_ref)!r} cannot be served: {given}", engine=request.engine)

    @staticmethod
    def _ctx_auto(model: Model) -> int:
        return min(model.ctx_trained or CTX_AUTO_MIN, CTX_AUTO_MAX)

    def _seated(self, engine: str, model: Model, ctx: int, *, is_ctx_asked: bool) -> Draft:
        """Places for its replicas. Only a context that nobody asked for is lowered until the model fits."""
        while True:
            draft = self._builder.draft(self._settings_for(engine, model, ctx), model)
            seat_alone(self._builder, draft, self._empty())
            if any(seat.problem is None for seat in draft.seats):
                return draft
            if is_ctx_asked or ctx // 2 < CTX_AUTO_MIN:
                raise _fits_nowhere(draft)
            ctx //= 2

    def _settings_for(self, engine: str, model: Model, ctx: int) -> PoolSettings:
        wanted = self._settings.on_demand
        return PoolSettings(
            id=self._free_id(_pool_id(engine, model, ctx)),
            engine=engine,
            model=model.reference,
            slots=wanted.slots,
            ctx=ctx,
            max_tokens=min(PoolSettings().max_tokens, ctx),
            keep_alive_ms=wanted.keep_alive_ms,
        )

    def _free_id(self, wanted: str) -> str:
        """Another model may have the id: the pool that had it first was reloaded."""
        taken = {pool.spec.pool_id for pool in self._scheduler.fleet.every_pool()}
        return next(one for one in chain([wanted], (f"{wanted}-{number}" for number in count(2))) if one not in taken)

    def _empty(self) -> Room:
        """What the devices have beside that which stays loaded, in which a model could be loaded some time."""
        ledger = self._scheduler.fleet.ledger
        return empty_room(list(ledger.devices.values())).beside(
            {device_id: ledger.staying_bytes(device_id) for device_id in ledger.devices}
        )

    def _make_room(self) -> None:
        """The list of pools is bounded: one that has not been used for the longest time goes, if it is not loaded."""
        ours = [pool for pool in self._scheduler.pools.values() if pool.spec.is_on_demand]
        if len(ours) < POOLS_MAX:
            return
        coming = self._scheduler.fleet.coming
        idle = [p for p in ours if p.is_idle and not p.is_loaded and p.spec.pool_id not in coming]
        if not idle:
            raise ReplicaExhausted(
                f"{POOLS_MAX} models are loaded on demand, which is the limit; repeat later", retry_after_ms=10_000
            )
        oldest = min(idle, key=lambda pool: max((r.last_used_s for r in pool.replicas.values()), default=0.0))
        self._scheduler.fleet.remove(oldest)
        del self._pool_settings[oldest.spec.pool_id]

    def forget(self, model_id: str, file: Path | None) -> None:
        """No pool answers to the name of a model that was deleted from the catalog; one that was made for it goes, or
        for the `file` that was fetched of it, whatever its name was."""
        for pool in list(self._scheduler.pools.values()):
            if pool.spec.is_on_demand and (pool.spec.model == model_id or file in self._paths(pool)):
                self._scheduler.fleet.remove(pool)
                del self._pool_settings[pool.spec.pool_id]
        for pool in self._scheduler.fleet.every_pool():
            if model_id in pool.spec.aliases:
                pool.spec = replace(pool.spec, aliases=tuple(one for one in pool.spec.aliases if one != model_id))

    # -- another model for a pool --------------------------------------------------------------------------------------

    async def successor(self, pool_id: str, reference: str) -> Built:
        """The pool with another model, to take its place. Raises the reasons why it cannot be."""
        old = self._scheduler.pool(pool_id)
        is_configured = any(pool.model == reference for pool in self._settings.pools)
        if not (is_configured or self._may_be_named(reference)):
            raise NotFound(
                f"there is no model {without_query(reference)!r}; name one of the configuration's or of the catalog's, "
                "builtin:tiny, or a file below one of `catalog.file_roots`"
            )
        try:
            model = await self._look(reference)
        except ModelNotFound as error:
            raise NotFound(str(error)) from error
        await self._bars.check(reference)
        self._bars.check_file(reference, model.path)
        settings = structs.replace(self._pool_settings[pool_id], model=reference)
        problem = model_problem(self._builder.engines[settings.engine], model, settings.ctx)
        if problem is not None:
            raise InvalidParams(f"{reference!r} cannot be served by pool {pool_id}: {problem}", engine=settings.engine)
        draft = self._builder.draft(settings, model)
        self._seat_in_place(draft, old)
        built = self._builder.build(draft, state=ReplicaState.UNLOADED, is_on_demand=old.spec.is_on_demand)
        self._replicas.add(built.workers)
        return built

    def withdraw(self, built: Built) -> None:
        """It does not take the pool's place after all."""
        for replica_id in built.workers:
            self._replicas.discard(replica_id)

    def _seat_in_place(self, draft: Draft, old: Pool) -> None:
        """Where the pool's devices have room for it once the old model, and what was loaded on demand, has left."""
        ledger = self._scheduler.fleet.ledger
        leaving = [
            replica
            for replica in self._scheduler.replicas.values()
            if replica.holds_memory and (replica.replica_id in old.replicas or not replica.is_pinned)
        ]
        free = {
            device_id: ledger.free_bytes(device_id) + sum(r.need_bytes.get(device_id, 0) for r in leaving)
            for device_id in ledger.devices
        }
        sound = {device_id: free[device_id] for device_id, device in ledger.devices.items() if device.problem is None}
        room = Room({device_id: sound.get(device_id, 0) for device_id in free})
        self._builder.seat(draft, room)
        while self._builder.widen(draft, room):
            pass
        if all(seat.problem is not None for seat in draft.seats):
            raise _fits_nowhere(draft)
        draft.seats = [seat for seat in draft.seats if seat.problem is None]


def answer_to(pool: Pool, reference: str) -> None:
    """The pool serves who names its model so, from now on."""
    if not pool.serves(reference):
        pool.spec = replace(pool.spec, aliases=(*pool.spec.aliases, reference)[-ALIASES_MAX:])


def _own_name(request: TaskRequest, entry: Entry | None) -> str:
    """What a pool calls the model: what comes from elsewhere by its catalog id, since a URL may hold a secret."""
    return entry.id if entry is not None and entry.is_fetched else request.model_ref


def _fits_nowhere(draft: Draft) -> InvalidParams:
    problems = [seat.problem for seat in draft.seats if seat.problem is not None]
    needs = {device_id: need for seat in draft.seats for device_id, need in seat.need_bytes.items()}
    return InvalidParams("; ".join(problems), engine=draft.settings.engine, details={"need_bytes": needs})


def _pool_id(engine: str, model: Model, ctx: int) -> str:
    """Readable, and one for each file, engine and context."""
    kind, _, rest = without_query(model.reference).partition(":")
    name = re.sub(r"[^A-Za-z0-9._-]", "-", Path(rest).stem if kind == "file" else rest or kind)[:40]
    digest = hashlib.sha256(f"{model.path}|{engine}|{ctx}".encode()).hexdigest()
    return f"on-demand-{name}-{digest[:6]}"
