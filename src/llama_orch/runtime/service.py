"""The service as the edge sees it: the orchestrator's state in the contract's words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from llama_orch.budgets import BudgetsLeft
from llama_orch.contract.config import Settings
from llama_orch.contract.models import (
    AdmissionResponse,
    Artifact,
    ArtifactKind,
    ArtifactList,
    ArtifactRef,
    Backend,
    Capabilities,
    Concurrency,
    EngineCapability,
    FetchRequest,
    FetchResult,
    FullPolicy,
    PolicyDecision,
    PoolCapability,
    PoolHealth,
    PoolList,
    Priority,
    Queue,
    RateLimits,
    ReplicaState,
    SamplerProfile,
    SessionInfo,
    StoredArtifact,
    TaskList,
    TaskRequest,
    TaskState,
    TaskStatus,
)
from llama_orch.contract.models import Device as DeviceView
from llama_orch.contract.models import Pool as PoolView
from llama_orch.contract.operations import API_VERSION
from llama_orch.core.pool import Pool
from llama_orch.core.replica import Replica
from llama_orch.core.task import ENDED, Task
from llama_orch.devices.inventory import Source
from llama_orch.engines.base import Engine
from llama_orch.errors import InvalidParams
from llama_orch.observe.metrics import Metrics, Reading
from llama_orch.runtime import views
from llama_orch.runtime.fetching import Fetching
from llama_orch.runtime.orchestrator import Orchestrator
from llama_orch.runtime.streams import Reader


class LocalService:
    """Reads and acts for one HTTP call at a time. Reading changes nothing."""

    def __init__(
        self,
        orchestrator: Orchestrator,
        engines: Mapping[str, Engine],
        sources: Sequence[Source],
        metrics: Metrics,
        settings: Settings,
        fetching: Fetching,
    ) -> None:
        self._fetching = fetching
        self._orchestrator = orchestrator
        self._scheduler = orchestrator.scheduler
        self._engines = engines
        self._sources = sources
        self._metrics = metrics
        self._settings = settings

    # -- tasks ---------------------------------------------------------------------------------------------------------

    async def submit(self, request: TaskRequest) -> AdmissionResponse:
        task = await self._orchestrator.submit(request)
        return views.admission(task, self._orchestrator.outlook(task), self._orchestrator.backoff_ms(task.pool))

    def get_task(self, task_id: str) -> TaskStatus:
        return self._task_view(self._scheduler.known(task_id))

    def _task_view(self, task: Task) -> TaskStatus:
        orchestrator = self._orchestrator
        text = orchestrator.text(task.task_id) if task.state in ENDED else ""
        return views.task_status(task, task.pool, orchestrator.outlook(task), orchestrator.wall, text)

    def list_tasks(
        self, *, state: TaskState | None, session_id: str | None, limit: int, cursor: str | None
    ) -> TaskList:
        before = None if cursor is None else _number(cursor)
        found: list[Task] = []
        for task in reversed(self._scheduler.tasks.values()):  # newest first
            if (
                (before is None or task.number < before)
                and (state is None or task.state is state)
                and (session_id is None or task.request.session_id == session_id)
            ):
                found.append(task)
                if len(found) > limit:
                    break
        page = found[:limit]
        more = str(page[-1].number) if len(found) > limit else None
        return TaskList(items=[self._task_view(task) for task in page], next_cursor=more)

    async def cancel(self, task_id: str) -> None:
        self._orchestrator.cancel(task_id)

    def open_stream(self, task_id: str, after: int) -> Reader:
        return self._orchestrator.open_stream(task_id, after)

    def budgets_left(self, session_id: str | None) -> BudgetsLeft:
        return self._scheduler.book.sessions.left(None if session_id is None else session_id.lower())

    def budgets_left_of(self, task_id: str) -> BudgetsLeft:
        return self.budgets_left(self._scheduler.known(task_id).request.session_id)

    # -- sessions ------------------------------------------------------------------------------------------------------

    def get_session(self, session_id: str) -> SessionInfo:
        book = self._scheduler.book
        session = book.sessions.get(session_id)
        ttl_s = book.sessions.ttl_s(session, self._orchestrator.now())
        warmth = book.warmth(session_id)
        per_token = 0
        if warmth is not None:
            per_token = self._scheduler.fleet.owner(self._scheduler.replicas[warmth.replica_id]).spec.kv_bytes_per_token
        return views.session_info(session, ttl_s, warmth, per_token, book.sessions.left(session_id))

    async def delete_session(self, session_id: str) -> None:
        await self._orchestrator.delete_session(session_id)

    # -- pools ---------------------------------------------------------------------------------------------------------

    def list_pools(self, *, limit: int, cursor: str | None) -> PoolList:
        start = 0 if cursor is None else _number(cursor)
        pools = list(self._scheduler.pools.values())
        page = pools[start : start + limit]
        end = start + len(page)
        return PoolList(
            items=[views.pool_view(pool) for pool in page], next_cursor=str(end) if end < len(pools) else None
        )

    def get_pool(self, pool_id: str) -> PoolView:
        return views.pool_view(self._scheduler.pool(pool_id))

    def get_pool_health(self, pool_id: str) -> PoolHealth:
        return self._health(self._scheduler.pool(pool_id))

    def _health(self, pool: Pool) -> PoolHealth:
        """With the replicas of the models that come into the pool's place or leave it."""
        pool_id = pool.spec.pool_id
        others = [
            replica
            for one in self._scheduler.fleet.every_pool()
            if one is not pool and one.spec.pool_id == pool_id
            for replica in one.replicas.values()
        ]
        return views.pool_health(pool, others, self._scheduler.predictor.tokens_per_second(pool))

    async def drain_pool(self, pool_id: str, deadline_ms: int) -> PoolHealth:
        return self._health(self._orchestrator.drain_pool(pool_id, deadline_ms))

    async def reload_pool(self, pool_id: str, new_model_ref: str) -> PoolHealth:
        return self._health(await self._orchestrator.reload_pool(pool_id, new_model_ref))

    # -- artifacts -----------------------------------------------------------------------------------------------------

    async def put_artifact(self, artifact: Artifact) -> tuple[ArtifactRef, bool]:
        return await self._orchestrator.archive.put(artifact)

    async def list_artifacts(
        self, *, kind: ArtifactKind | None, tag: str | None, parent: str | None, limit: int, cursor: str | None
    ) -> ArtifactList:
        archive = self._orchestrator.archive
        return await archive.list(kind=kind, tag=tag, parent=parent, limit=limit, cursor=cursor)

    async def get_artifact(self, artifact_id: str) -> StoredArtifact:
        return await self._orchestrator.archive.get(artifact_id)

    async def delete_artifact(self, artifact_id: str) -> None:
        await self._orchestrator.archive.delete(artifact_id)

    # -- to elsewhere --------------------------------------------------------------------------------------------------

    async def check_outbound(self, url: str) -> PolicyDecision:
        return await self._fetching.check(url)

    async def fetch_url(self, request: FetchRequest) -> FetchResult:
        return await self._fetching.fetch(request)

    # -- capabilities --------------------------------------------------------------------------------------------------

    def capabilities(self) -> Capabilities:
        pools = list(self._scheduler.pools.values())
        limits = self._settings.server
        first = pools[0].spec
        return Capabilities(
            api_version=API_VERSION,
            engines=self._engine_views(pools),
            pools=[_pool_capability(pool) for pool in pools],
            devices=[self._device_view(source) for source in self._sources],
            concurrency=Concurrency(
                recommended=sum(pool.recommended_concurrency() for pool in pools),
                slots=sum(pool.slots_total() for pool in pools),
            ),
            queue=Queue(capacity=first.queue_capacity, full_policy=FullPolicy(first.full_policy)),
            rate_limits=RateLimits(
                requests_per_second=None, streams=limits.max_streams, body_bytes=limits.max_body_bytes
            ),
            sampler_profiles=[
                SamplerProfile(
                    version=version,
                    temperature=profile.temperature,
                    top_k=profile.top_k,
                    top_p=profile.top_p,
                    min_p=profile.min_p,
                    repeat_penalty=profile.repeat_penalty,
                )
                for version, profile in self._settings.sampler_profiles.items()
            ],
            features=sorted({feature for pool in pools for feature in pool.spec.features}),
        )

    def _engine_views(self, pools: Sequence[Pool]) -> list[EngineCapability]:
        used = {pool.spec.engine for pool in pools}
        return [
            EngineCapability(
                engine=name,
                version=engine.traits.version,
                workloads=list(engine.traits.workloads),
                ctx_max=max((pool.spec.ctx for pool in pools if pool.spec.engine == name), default=None),
                determinism=engine.traits.determinism,
                features=list(engine.traits.features),
            )
            for name, engine in self._engines.items()
            if name in used or name != "simulated"  # a rehearsal's engine is listed in a rehearsal only
        ]

    def _device_view(self, source: Source) -> DeviceView:
        device, ledger = source.device, self._scheduler.fleet.ledger
        problem = source.read_problem()
        reserved = ledger.held_bytes(device.device_id) + ledger.promised_bytes(device.device_id)
        free = min(source.read_free_bytes(), max(0, device.vram_total_bytes - reserved))
        return DeviceView(
            id=device.device_id,
            name=device.name,
            backend=Backend(device.backend),
            vram_total_bytes=device.vram_total_bytes,
            vram_free_bytes=0 if problem is not None else free,
            vram_reserved_bytes=reserved,
            problem=problem,
        )

    def metrics_text(self) -> bytes:
        return self._metrics.text()


def _pool_capability(pool: Pool) -> PoolCapability:
    spec = pool.spec
    return PoolCapability(
        id=spec.pool_id,
        engine=spec.engine,
        model=spec.model,
        workloads=list(spec.workloads),
        ctx=spec.ctx,
        slots=pool.slots_total(),
        max_tokens=spec.max_tokens,
        recommended_concurrency=pool.recommended_concurrency(),
        sampler_profile_version=spec.sampler_profile_version,
    )


def _number(cursor: str) -> int:
    if not (cursor.isascii() and cursor.isdigit() and len(cursor) <= 18):
        raise InvalidParams("`cursor` is not one that this service gave out; start again without it")
    return int(cursor)


def gauges(orchestrator: Orchestrator, sources: Sequence[Source]) -> Iterator[Reading]:
    """Every gauge of openapi/metrics.yaml from the state as it is now."""
    yield "streams_open", (), orchestrator.streams_open
    by_id = {source.device.device_id: source for source in sources}
    fleet = orchestrator.scheduler.fleet
    for pool in fleet.pools.values():
        for priority in Priority:
            yield "queue_depth", (*_labels(pool), priority.value), pool.queue.depth(priority)
    for pool in fleet.every_pool():
        for replica in pool.replicas.values():
            labels = (*_labels(pool), replica.replica_id)
            is_ready = replica.state is ReplicaState.READY
            yield "slots_busy", labels, replica.slots_busy
            yield "slots_total", labels, replica.slots if is_ready else 0
            yield "replica_ready", labels, int(is_ready)
            if is_ready:
                yield "kv_cache_usage_ratio", labels, _kv_share(orchestrator, pool, replica)
            if replica.holds_memory:
                for device_id in replica.device_ids:
                    yield from _device_gauges(orchestrator, replica, by_id[device_id], labels)


def _kv_share(orchestrator: Orchestrator, pool: Pool, replica: Replica) -> float:
    """Of the replica's context, what running tasks and sessions hold."""
    scheduler = orchestrator.scheduler
    running = [scheduler.tasks[task_id] for task_id in set(replica.leases.values())]
    tokens = sum(min(pool.spec.ctx, (task.tokens_in or 0) + task.tokens_out) for task in running)
    return (tokens + scheduler.book.affinity.tokens_on(replica)) / (replica.slots * pool.spec.ctx)


def _labels(pool: Pool) -> tuple[str, str, str]:
    return pool.spec.engine, pool.spec.engine_version, pool.spec.pool_id


def _device_gauges(
    orchestrator: Orchestrator, replica: Replica, source: Source, labels: tuple[str, ...]
) -> Iterator[Reading]:
    """What a replica takes of a device, and how busy the device is, whoever keeps it so."""
    device_id = source.device.device_id
    used = replica.need_bytes.get(device_id, 0)
    if source.backend == "cuda":
        told = [source.read_process_bytes(pid) for pid in orchestrator.replicas.pids(replica.replica_id)]
        used = sum(count for count in told if count is not None) or used
    yield "vram_used_bytes", (*labels, device_id), used
    utilization = source.read_utilization()
    if utilization is None and source.backend == "simulated":
        utilization = orchestrator.scheduler.fleet.busy_share(device_id)
    if utilization is not None:
        yield "gpu_utilization", (*labels, device_id), utilization
