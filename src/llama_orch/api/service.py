"""What the edge needs from the service underneath. Every method refuses by raising a LlorchError."""

from __future__ import annotations

from typing import Protocol

from llama_orch.budgets import BudgetsLeft
from llama_orch.contract.models import (
    AdmissionResponse,
    Artifact,
    ArtifactKind,
    ArtifactList,
    ArtifactRef,
    Capabilities,
    FetchRequest,
    FetchResult,
    PolicyDecision,
    Pool,
    PoolHealth,
    PoolList,
    SessionInfo,
    StoredArtifact,
    TaskList,
    TaskRequest,
    TaskState,
    TaskStatus,
)


class Reader(Protocol):
    """One reader of one task's frames. `close` may be called at any time, also while `batch` waits, and more than
    once."""

    async def batch(self) -> bytes | None:
        """Encoded SSE frames that are ready, at least one; None after the last one."""

    def close(self) -> None: ...


class Service(Protocol):
    """Task IDs and session IDs come in lower case from paths and queries, as sent from bodies."""

    async def submit(self, request: TaskRequest) -> AdmissionResponse: ...

    def get_task(self, task_id: str) -> TaskStatus: ...

    def list_tasks(
        self, *, state: TaskState | None, session_id: str | None, limit: int, cursor: str | None
    ) -> TaskList: ...

    async def cancel(self, task_id: str) -> None: ...

    def open_stream(self, task_id: str, after: int) -> Reader:
        """A reader of the frames behind number `after`; -1 reads all."""

    def budgets_left(self, session_id: str | None) -> BudgetsLeft:
        """What the tasks of a session may still use."""

    def budgets_left_of(self, task_id: str) -> BudgetsLeft:
        """The same by one of its tasks."""

    def get_session(self, session_id: str) -> SessionInfo: ...

    async def delete_session(self, session_id: str) -> None:
        """End the session and have the engine forget it. Nothing where there is none."""

    def list_pools(self, *, limit: int, cursor: str | None) -> PoolList: ...

    def get_pool(self, pool_id: str) -> Pool: ...

    def get_pool_health(self, pool_id: str) -> PoolHealth: ...

    async def drain_pool(self, pool_id: str, deadline_ms: int) -> PoolHealth:
        """Begin a drain, or give the one that runs a new deadline; the health as it is then."""

    async def reload_pool(self, pool_id: str, new_model_ref: str) -> PoolHealth:
        """Begin a reload; the health as it is then. Conflict while another one runs."""

    async def put_artifact(self, artifact: Artifact) -> tuple[ArtifactRef, bool]:
        """Store it. Whether it is new; else the reference is that of the first one with this content."""

    async def list_artifacts(
        self, *, kind: ArtifactKind | None, tag: str | None, parent: str | None, limit: int, cursor: str | None
    ) -> ArtifactList: ...

    async def get_artifact(self, artifact_id: str) -> StoredArtifact: ...

    async def delete_artifact(self, artifact_id: str) -> None: ...

    async def check_outbound(self, url: str) -> PolicyDecision:
        """What the outbound policy says about a request, which is not made."""

    async def fetch_url(self, request: FetchRequest) -> FetchResult: ...

    def capabilities(self) -> Capabilities: ...

    def metrics_text(self) -> bytes:
        """Prometheus text format 0.0.4."""
