"""One value for each call of the contract: what is sent, and the type of what comes back. No I/O."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar
from urllib.parse import quote

import msgspec

from llama_orch.contract.models import (
    AdmissionResponse,
    Artifact,
    ArtifactKind,
    ArtifactList,
    ArtifactRef,
    Capabilities,
    DrainRequest,
    FetchRequest,
    FetchResult,
    OutboundCheck,
    PolicyDecision,
    Pool,
    PoolHealth,
    PoolList,
    ReloadRequest,
    SessionInfo,
    StoredArtifact,
    TaskList,
    TaskRequest,
    TaskState,
    TaskStatus,
)

POLL_S = 0.5  # between two looks at a pool

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """A request and its answer's type; `answer` None: there is no body to read. A call that is not repeatable is sent
    again only where nothing has happened: after a refusal, or a connection that was never made."""

    method: str
    path: str
    answer: type[T] | None
    body: object = None
    query: Mapping[str, object] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    is_repeatable: bool = True

    def parts(self) -> dict[str, Any]:
        """Arguments of httpx's `build_request`."""
        content = None if self.body is None else msgspec.json.encode(self.body)
        kind = {} if self.body is None else {"Content-Type": "application/json"}
        params = {name: str(value) for name, value in self.query.items() if value is not None}
        return {
            "method": self.method,
            "url": self.path,
            "content": content,
            "headers": {**kind, **self.headers},
            "params": params,
        }


# -- tasks -----------------------------------------------------------------------------------------------------------


def submit(request: TaskRequest) -> Call[AdmissionResponse]:
    """The task gets its id here, before the first attempt, so that a repeat is the same task (HP-ADM-8)."""
    if request.task_id is None:
        request = msgspec.structs.replace(request, task_id=str(uuid.uuid4()))
    return Call("POST", "/v1/tasks", AdmissionResponse, request)


def cancel(task_id: str) -> Call[None]:
    return Call("POST", f"{task_path(task_id)}/cancel", None)


def get_task(task_id: str) -> Call[TaskStatus]:
    return Call("GET", task_path(task_id), TaskStatus)


def list_tasks(
    state: TaskState | None, session_id: str | None, limit: int | None, cursor: str | None
) -> Call[TaskList]:
    query = {"state": state, "session_id": session_id, "limit": limit, "cursor": cursor}
    return Call("GET", "/v1/tasks", TaskList, query=query)


def stream(task_id: str, last_event_id: str) -> Call[None]:
    """`last_event_id`: of the last frame that the caller has, empty for none."""
    headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": last_event_id} if last_event_id else {})
    return Call("GET", f"{task_path(task_id)}/stream", None, headers=headers)


# -- artifacts -------------------------------------------------------------------------------------------------------


def put_artifact(artifact: Artifact) -> Call[ArtifactRef]:
    """Repeatable: equal content is one artifact."""
    return Call("POST", "/v1/artifacts", ArtifactRef, artifact)


def get_artifact(artifact_id: str) -> Call[StoredArtifact]:
    return Call("GET", _artifact_path(artifact_id), StoredArtifact)


def list_artifacts(
    kind: ArtifactKind | None, tag: str | None, parent: str | None, limit: int | None, cursor: str | None
) -> Call[ArtifactList]:
    query = {"kind": kind, "tag": tag, "parent": parent, "limit": limit, "cursor": cursor}
    return Call("GET", "/v1/artifacts", ArtifactList, query=query)


def delete_artifact(artifact_id: str) -> Call[None]:
    """Not repeatable: where the connection broke it may be gone, and the repeat would not find it."""
    return Call("DELETE", _artifact_path(artifact_id), None, is_repeatable=False)


# -- sessions --------------------------------------------------------------------------------------------------------


def session(session_id: str) -> Call[SessionInfo]:
    return Call("GET", f"/v1/sessions/{quote(session_id, safe='')}", SessionInfo)


def delete_session(session_id: str) -> Call[None]:
    return Call("DELETE", f"/v1/sessions/{quote(session_id, safe='')}", None)


# -- pools and the installation --------------------------------------------------------------------------------------


def pools(limit: int | None, cursor: str | None) -> Call[PoolList]:
    return Call("GET", "/v1/pools", PoolList, query={"limit": limit, "cursor": cursor})


def pool(pool_id: str) -> Call[Pool]:
    return Call("GET", _pool_path(pool_id), Pool)


def pool_health(pool_id: str) -> Call[PoolHealth]:
    return Call("GET", f"{_pool_path(pool_id)}/health", PoolHealth)


def drain_pool(pool_id: str, deadline_ms: int) -> Call[PoolHealth]:
    """Repeatable: a second drain sets the same deadline anew."""
    return Call("POST", f"{_pool_path(pool_id)}/drain", PoolHealth, DrainRequest(deadline_ms=deadline_ms))


def reload_pool(pool_id: str, new_model_ref: str) -> Call[PoolHealth]:
    """Not repeatable: where the connection broke it may have begun, and a second one would be in conflict with it."""
    body = ReloadRequest(new_model_ref=new_model_ref)
    return Call("POST", f"{_pool_path(pool_id)}/reload", PoolHealth, body, is_repeatable=False)


def check_outbound(url: str) -> Call[PolicyDecision]:
    return Call("POST", "/v1/policy/outbound/check", PolicyDecision, OutboundCheck(url=url))


def fetch_url(request: FetchRequest) -> Call[FetchResult]:
    return Call("POST", "/v1/tools/fetch", FetchResult, request)


def capabilities() -> Call[Capabilities]:
    return Call("GET", "/v1/capabilities", Capabilities)


def task_path(task_id: str) -> str:
    return f"/v1/tasks/{_quoted(task_id)}"


def _artifact_path(artifact_id: str) -> str:
    return f"/v1/artifacts/{_quoted(artifact_id)}"


def _pool_path(pool_id: str) -> str:
    return f"/v1/pools/{_quoted(pool_id)}"


def _quoted(part: str) -> str:
    """An id stays one segment of the path."""
    return quote(part, safe="")
