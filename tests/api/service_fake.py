"""A service in memory, with behaviour: it admits, lists, cancels, streams, drains and reloads, and misbehaves where a
name asks for it."""

from __future__ import annotations

import asyncio
import threading
import uuid
from dataclasses import dataclass, field

import msgspec

from llama_orch.budgets import NO_BUDGETS, BudgetsLeft
from llama_orch.contract.models import (
    AdmissionResponse,
    Backend,
    Capabilities,
    Concurrency,
    Device,
    EndFrame,
    FetchRequest,
    FetchResult,
    FinishReason,
    FullPolicy,
    MetricsFrame,
    PolicyDecision,
    Pool,
    PoolHealth,
    PoolList,
    PoolMetrics,
    Priority,
    Queue,
    QueueDepth,
    RateLimits,
    Replica,
    ReplicaState,
    SessionInfo,
    StartedFrame,
    TaskList,
    TaskRequest,
    TaskState,
    TaskStatus,
    Workload,
)
from llama_orch.contract.operations import API_VERSION
from llama_orch.errors import (
    AdmissionReject,
    Conflict,
    InvalidParams,
    NotFound,
    PolicyDenied,
    PoolUnavailable,
    PoolUnready,
    ReplicaExhausted,
    UpstreamFailed,
    WorkerReset,
)
from llama_orch.runtime.streams import TaskStream

from .artifacts_fake import FakeArtifacts
from .catalog_fake import FakeCatalog

SECRET = "hunter2-in-an-exception"

# What a model_ref or an ID makes the service do.
FULL_QUEUE = "builtin:full-queue"
CRASHING_MODEL = "builtin:crashing"
SLOW_MODEL = "builtin:slow"  # its load goes on until `loaded`
ABSENT_MODEL = "builtin:absent"
DENIED_URL = "http://denied.example/"
UNREADABLE_URL = "no URL"
BROKEN_URL = "http://broken.example/"
CROWDED_URL = "http://crowded.example/"
UNWANTED_MODEL = "builtin:unwanted"  # not now
UNREADY_MODEL = "builtin:unready"  # refused until its `loads_left` have passed
FAILING_MODEL = "builtin:failing"  # its tasks lose their worker
ENDLESS_MODEL = "builtin:endless"
CROWDED_MODEL = "builtin:crowded"  # no stream can be opened
WORDS = ("Once", " upon", " a\n\ntime")
ENDING_TASK = "00000000-0000-4000-8000-00000000e4d0"
ENDLESS_TASK = "00000000-0000-4000-8000-0000000000aa"
BREAKING_TASK = "00000000-0000-4000-8000-0000000000bb"
CROWDED_TASK = "00000000-0000-4000-8000-0000000000cc"
MISSHAPEN_POOL = "misshapen"
SPARE_POOL = "spare"  # no task goes there: to be drained and reloaded

GIB = 2**30

FRAMES = [b'id: %d\nevent: token\ndata: {"t":"a","i":%d}\n\n' % (i, i) for i in range(3)]


def metrics(queue_position: int | None) -> MetricsFrame:
    return MetricsFrame(
        queue_depth=0,
        queue_position=queue_position,
        predicted_start_ms=None,
        tokens_in=4,
        tokens_out=3,
        on_time_probability=None,
        kv_warmth=False,
        tokens_budget_remaining=None,
        time_budget_remaining_ms=None,
        cost_budget_remaining=None,
    )


def end_frame(**fields: object) -> EndFrame:
    end = EndFrame(
        tokens_in=4,
        tokens_out=3,
        decode_time_ms=7,
        finish_reason=FinishReason.STOP,
        seed=7,
        model_digest="sha256:" + "1f" * 32,
        engine="llamacpp",
        engine_version="1",
        sampler_profile_version="v1",
        kv_warmth=False,
    )
    return msgspec.structs.replace(end, **fields)


def a_stream(request: TaskRequest) -> list[bytes]:
    """What a task of this request says, batch by batch, but for the last frame of an endless one."""
    stream = TaskStream(StartedFrame(task_id=request.task_id or "", queue_position=1, predicted_start_ms=420))
    stream.metrics(metrics(0))
    for word in WORDS if request.workload is Workload.COMPLETION else ():
        stream.token(word)
    stream.metrics(metrics(None))
    if request.model_ref == FAILING_MODEL:
        stream.end(WorkerReset("the worker was lost", engine="llamacpp", retry_after_ms=1200).body("cid"))
    elif request.workload is Workload.EMBEDDING:
        stream.end(end_frame(embeddings=[[0.6, -0.8] for _ in request.inputs or ()], tokens_out=0))
    elif request.model_ref != ENDLESS_MODEL:
        stream.end(end_frame())
    return [frame.data for frame in stream.after(-1)]


class FakeReader:
    """Gives `frames` one by one; then ends, waits for `close`, or breaks."""

    def __init__(self, frames: list[bytes], *, then: str = "end") -> None:
        self.frames, self.then = list(frames), then
        self.closed = threading.Event()
        self._forever = asyncio.Event()

    async def batch(self) -> bytes | None:
        if self.frames:
            return self.frames.pop(0)
        if self.then == "break":
            raise RuntimeError(SECRET)
        if self.then == "wait":
            await self._forever.wait()
        return None

    def close(self) -> None:
        self.closed.set()


@dataclass
class FakePool:
    """One replica; a drain is over at once where its deadline is 0."""

    model: str = "builtin:tiny"
    loads: str | None = None  # the model that a reload waits for
    last_reload: str | None = None
    deadlines_ms: list[int] = field(default_factory=list)  # of the drains since the last reload

    @property
    def state(self) -> ReplicaState:
        return ReplicaState.UNLOADED if self.deadlines_ms[-1:] == [0] else ReplicaState.READY

    def begin_reload(self, model: str) -> None:
        if self.loads is not None:
            raise Conflict(f"the pool loads {self.loads}; wait until its health says how that ended")
        self.loads, self.last_reload = model, f"loading {model} beside {self.model}"

    def loaded(self) -> None:
        assert self.loads is not None
        self.last_reload = f"done: {self.loads} instead of {self.model}"
        self.model, self.loads, self.deadlines_ms = self.loads, None, []


class FakeService(FakeArtifacts):
    def __init__(self) -> None:
        super().__init__(forever=ENDING_TASK)
        self.pools = {name: FakePool() for name in ("default", SPARE_POOL, MISSHAPEN_POOL)}
        self.requests: dict[str, TaskRequest] = {}
        self.readers: dict[str, FakeReader] = {}
        self.canceled: list[str] = []
        self.listed: list[dict[str, object]] = []
        self.fetched: list[FetchRequest] = []
        self.left = NO_BUDGETS
        self.ended_sessions: set[str] = set()
        self.catalog = FakeCatalog()
        self.loads_left = 0

    async def submit(self, request: TaskRequest) -> AdmissionResponse:
        if request.model_ref == FULL_QUEUE:
            raise AdmissionReject("the queue is full", engine="llamacpp", retry_after_ms=1200, policy_label="reject")
        if request.model_ref == CRASHING_MODEL:
            raise RuntimeError(SECRET)
        if request.model_ref == UNREADY_MODEL and self.loads_left:
            self.loads_left -= 1
            raise PoolUnready("the pool is loading its model", engine="llamacpp", retry_after_ms=2500)
        task_id = request.task_id or str(uuid.uuid4())
        self.requests[task_id] = request
        return AdmissionResponse(
            task_id=task_id, queue_position=0, predicted_start_ms=None, backoff_ms=0, pool_id="default", seed=7
        )

    def get_task(self, task_id: str) -> TaskStatus:
        if task_id not in self.requests and task_id != ENDING_TASK:
            raise NotFound("no such task")
        return a_task_status(task_id)

    def list_tasks(
        self, *, state: TaskState | None, session_id: str | None, limit: int, cursor: str | None
    ) -> TaskList:
        self.listed.append({"state": state, "session_id": session_id, "limit": limit, "cursor": cursor})
        return TaskList(items=[a_task_status(task_id) for task_id in self.requests][:limit], next_cursor=None)

    async def cancel(self, task_id: str) -> None:
        self.canceled.append(task_id)

    def open_stream(self, task_id: str, after: int) -> FakeReader:
        endings = {ENDING_TASK: "end", ENDLESS_TASK: "wait", BREAKING_TASK: "break"}
        if task_id == CROWDED_TASK:
            raise ReplicaExhausted("too many streams are open", retry_after_ms=500)
        if (request := self.requests.get(task_id)) is not None:
            if request.model_ref == CROWDED_MODEL:
                raise ReplicaExhausted("too many streams are open", retry_after_ms=500)
            then = "wait" if request.model_ref == ENDLESS_MODEL else "end"
            self.readers[task_id] = FakeReader(a_stream(request)[after + 1 :], then=then)
            return self.readers[task_id]
        if task_id not in endings:
            raise NotFound("no such task")
        self.readers[task_id] = FakeReader(FRAMES[after + 1 :], then=endings[task_id])
        return self.readers[task_id]

    def budgets_left(self, session_id: str | None) -> BudgetsLeft:
        return NO_BUDGETS if session_id is None else self.left

    def budgets_left_of(self, task_id: str) -> BudgetsLeft:
        return self.budgets_left(self.requests[task_id].session_id if task_id in self.requests else None)

    def get_session(self, session_id: str) -> SessionInfo:
        turns = sum(request.session_id == session_id for request in self.requests.values())
        if session_id != ENDING_TASK and (not turns or session_id in self.ended_sessions):
            raise NotFound("no such session")
        return SessionInfo(
            ttl_ms_remaining=600_000,
            turns=turns,
            kv_bytes=0,
            kv_warmth=False,
            tokens_budget_remaining=self.left.tokens,
            time_budget_remaining_ms=self.left.time_ms,
            cost_budget_remaining=self.left.cost,
        )

    async def delete_session(self, session_id: str) -> None:
        self.ended_sessions.add(session_id)

    def list_pools(self, *, limit: int, cursor: str | None) -> PoolList:
        """Two pages."""
        if cursor is None:
            return PoolList(items=[self.get_pool("default")][:limit], next_cursor="1")
        return PoolList(items=[self.get_pool(SPARE_POOL)], next_cursor=None)

    def get_pool(self, pool_id: str) -> Pool:
        pool = self._pool(pool_id)
        return Pool(
            id=pool_id,
            engine="llamacpp",
            engine_version="1",
            model=pool.model,
            model_digest=None,
            ctx=0 if pool_id == MISSHAPEN_POOL else 2048,
            slots=4,
            slots_total=4,
            max_tokens=256,
            sampler_profile_version="v1",
            queue=Queue(capacity=64, full_policy=FullPolicy.REJECT),
            queue_depth=QueueDepth(interactive=0, batch=0),
            ready=pool.state is ReplicaState.READY,
            on_demand=False,
            keep_alive_ms=300_000 if pool_id == SPARE_POOL else None,
        )

    def _pool(self, pool_id: str) -> FakePool:
        if pool_id not in self.pools:
            raise NotFound("no such pool")
        return self.pools[pool_id]

    def get_pool_health(self, pool_id: str) -> PoolHealth:
        pool = self._pool(pool_id)
        is_ready = pool.state is ReplicaState.READY
        replica = Replica(
            id=f"{pool_id}-0",
            devices=["gpu0"],
            state=pool.state,
            slots_busy=0,
            slots_total=4,
            restarts=0,
            last_error=None,
            vram_reserved_bytes=GIB if is_ready else 0,
        )
        return PoolHealth(
            live=True,
            ready=is_ready,
            draining=bool(pool.deadlines_ms),
            last_error=None,
            last_reload=pool.last_reload,
            replicas=[replica],
            metrics=PoolMetrics(queue_depth=0, tokens_in=0, tokens_out=0, tokens_per_second=None),
        )

    async def drain_pool(self, pool_id: str, deadline_ms: int) -> PoolHealth:
        self._pool(pool_id).deadlines_ms.append(deadline_ms)
        return self.get_pool_health(pool_id)

    async def reload_pool(self, pool_id: str, new_model_ref: str) -> PoolHealth:
        pool = self._pool(pool_id)
        if new_model_ref == ABSENT_MODEL:
            raise InvalidParams(f"there is no {ABSENT_MODEL}")
        if new_model_ref == UNWANTED_MODEL:
            raise PoolUnavailable("the service is ending", engine="llamacpp", retry_after_ms=1200)
        if new_model_ref == CRASHING_MODEL:
            raise RuntimeError(SECRET)
        pool.begin_reload(new_model_ref)
        if new_model_ref != SLOW_MODEL:
            pool.loaded()
        return self.get_pool_health(pool_id)

    async def check_outbound(self, url: str) -> PolicyDecision:
        allowed = url != DENIED_URL
        return PolicyDecision(
            allowed=allowed,
            rule="default" if allowed else "deny[0]",
            reason="because",
            url=None if url == UNREADABLE_URL else url,
            addresses=["192.0.2.1"],
            audit_id=ENDING_TASK,
        )

    async def fetch_url(self, request: FetchRequest) -> FetchResult:
        self.fetched.append(request)
        if request.url == DENIED_URL:
            raise PolicyDenied("a rule denies it", policy_label="deny[0]", details={"audit_id": ENDING_TASK})
        if request.url == BROKEN_URL:
            raise UpstreamFailed("broken.example breaks off", details={"audit_id": ENDING_TASK})
        if request.url == CROWDED_URL:
            raise ReplicaExhausted("too many at once", retry_after_ms=1200)
        headers = {"content-type": "text/plain"}
        return FetchResult(status=404, headers=headers, text="n\u00e4h", url=request.url, audit_id=ENDING_TASK)

    def capabilities(self) -> Capabilities:
        return Capabilities(
            api_version=API_VERSION,
            engines=[],
            pools=[],
            devices=[
                Device(
                    id="gpu0",
                    name="a card",
                    backend=Backend.SIMULATED,
                    vram_total_bytes=24 * GIB,
                    vram_free_bytes=0,
                    vram_reserved_bytes=GIB * len(self.pools),
                    problem="lost: the driver does not answer for it",
                )
            ],
            concurrency=Concurrency(recommended=1, slots=4),
            queue=Queue(capacity=64, full_policy=FullPolicy.REJECT),
            rate_limits=RateLimits(requests_per_second=None, streams=1024, body_bytes=65536),
            sampler_profiles=[],
            features=[],
        )

    def metrics_text(self) -> bytes:
        return b"# HELP queue_depth Tasks that wait.\n# TYPE queue_depth gauge\n"


def a_task_status(task_id: str) -> TaskStatus:
    return TaskStatus(
        task_id=task_id,
        session_id=None,
        state=TaskState.QUEUED,
        priority=Priority.INTERACTIVE,
        engine="llamacpp",
        pool_id="default",
        replica_id=None,
        queue_position=0,
        predicted_start_ms=None,
        created_at="2026-01-01T12:00:00.000Z",
        started_at=None,
        ended_at=None,
        tokens_in=0,
        tokens_out=0,
        seed=7,
        placement=None,
        error=None,
        text=None,
    )
