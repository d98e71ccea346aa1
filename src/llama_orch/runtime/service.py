"""The service as the edge sees it: the orchestrator's state in the contract's words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from llama_orch.contract.config import Settings
from llama_orch.contract.models import (
    AdmissionResponse,
    Backend,
    Capabilities,
    Concurrency,
    EngineCapability,
    FullPolicy,
    PoolCapability,
    PoolHealth,
    PoolList,
    Priority,
    Queue,
    RateLimits,
    ReplicaState,
    SamplerProfile,
    TaskList,
    TaskRequest,
    TaskState,
    TaskStatus,
)
from llama_orch.contract.models import Device as DeviceView
from llama_orch.contract.models import Pool as PoolView
from llama_orch.contract.operations import API_VERSION
from llama_orch.core.pool import Pool
from llama_orch.core.task import ENDED, Task
from llama_orch.devices.inventory import Source
from llama_orch.engines.base import Engine
from llama_orch.errors import InvalidParams
from llama_orch.observe.metrics import Metrics, Reading
from llama_orch.runtime import views
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
    ) -> None:
        self._orchestrator = orchestrator
        self._scheduler = orchestrator.scheduler
        self._engines = engines
        self._sources = sources
        self._metrics = metrics
        self._settings = settings

    # -- tasks ---------------------------------------------------------------------------------------------------------

    async def submit(self, request: TaskRequest) -> AdmissionResponse:
        task = await self._orchestrator.submit(request)
        pool = self._scheduler.pools[task.pool_id]
        return views.admission(task, self._orchestrator.outlook(task), self._orchestrator.backoff_ms(pool))

    def get_task(self, task_id: str) -> TaskStatus:
        return self._task_view(self._scheduler.known(task_id))

    def _task_view(self, task: Task) -> TaskStatus:
        orchestrator = self._orchestrator
        pool = self._scheduler.pools[task.pool_id]
        text = orchestrator.text(task.task_id) if task.state in ENDED else ""
        return views.task_status(task, pool, orchestrator.outlook(task), orchestrator.wall, text)

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
        pool = self._scheduler.pool(pool_id)
        return views.pool_health(pool, self._scheduler.predictor.tokens_per_second(pool_id))

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
        device = source.device
        return DeviceView(
            id=device.device_id,
            name=device.name,
            backend=Backend(device.backend),
            vram_total_bytes=device.vram_total_bytes,
            vram_free_bytes=source.read_free_bytes(),
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


def gauges(orchestrator: Orchestrator) -> Iterator[Reading]:
    """Every gauge of openapi/metrics.yaml from the state as it is now."""
    yield "streams_open", (), orchestrator.streams_open
    for pool in orchestrator.scheduler.pools.values():
        labels = (pool.spec.engine, pool.spec.engine_version, pool.spec.pool_id)
        for priority in Priority:
            yield "queue_depth", (*labels, priority.value), pool.queue.depth(priority)
        for replica in pool.replicas.values():
            is_ready = replica.state is ReplicaState.READY
            yield "slots_busy", (*labels, replica.replica_id), replica.slots_busy
            yield "slots_total", (*labels, replica.replica_id), replica.slots if is_ready else 0
            yield "replica_ready", (*labels, replica.replica_id), int(is_ready)
