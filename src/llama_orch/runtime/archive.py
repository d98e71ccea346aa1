"""What the service does with its store of artifacts: for clients, and for the transcripts of its own tasks (HP-ART-4).

A transcript never holds up the stream that it is of: it is written in the stores' thread, after the last frame. When
that fails the log says so, and the task is none the worse.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, ParamSpec, TypeVar

import msgspec

from llama_orch.contract.models import Artifact, ArtifactKind, ArtifactList, ArtifactRef, StoredArtifact, TaskRequest
from llama_orch.core.task import Task
from llama_orch.errors import InvalidParams, LlorchError, StorageUnavailable
from llama_orch.observe.logs import event
from llama_orch.runtime.streams import TaskStream
from llama_orch.stores.artifacts import ArtifactStore, Put

TRANSCRIPTS_WAITING_MAX = 256  # for the disk; beyond it they are not kept

T = TypeVar("T")
P = ParamSpec("P")

log = logging.getLogger("llama_orch.artifacts")


class Archive:
    """`store` None: there is none, as in a rehearsal. `keeps_transcripts`: of tasks that do not say."""

    def __init__(self, store: ArtifactStore | None, *, keeps_transcripts: bool) -> None:
        self._store = store
        self._keeps_transcripts = keeps_transcripts and store is not None
        self._places = threading.BoundedSemaphore(TRANSCRIPTS_WAITING_MAX)

    # -- for clients ---------------------------------------------------------------------------------------------------

    async def put(self, artifact: Artifact) -> tuple[ArtifactRef, bool]:
        put = await self._run(self._there().put, artifact)
        _note_trust_gap(put)
        return put.ref, put.is_new

    async def list(
        self, *, kind: ArtifactKind | None, tag: str | None, parent: str | None, limit: int, cursor: str | None
    ) -> ArtifactList:
        return await self._run(self._there().list, kind=kind, tag=tag, parent=parent, limit=limit, cursor=cursor)

    async def get(self, artifact_id: str) -> StoredArtifact:
        return await self._run(self._there().get, artifact_id)

    async def delete(self, artifact_id: str) -> None:
        await self._run(self._there().delete, artifact_id)

    def _there(self) -> ArtifactStore:
        if self._store is None:
            raise StorageUnavailable("this service runs without a store of artifacts; start it with `llama-orch serve`")
        return self._store

    async def _run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._there().database.run(function, *args, **kwargs)

    # -- transcripts ---------------------------------------------------------------------------------------------------

    def check(self, request: TaskRequest) -> None:
        """To take `keep_transcript` and not to keep it would be a lie."""
        if request.keep_transcript and self._store is None:
            raise InvalidParams("this service keeps no transcripts; leave `keep_transcript` out")

    def keep(self, task: Task, stream: TaskStream) -> None:
        """The transcript of a stream that has ended, if it is to be kept. Returns at once."""
        wanted = task.request.keep_transcript
        if self._store is None or not (self._keeps_transcripts if wanted is None else wanted):
            return
        fields = {"task_id": task.task_id, "correlation_id": task.correlation_id}
        if not self._places.acquire(blocking=False):
            event(log, logging.WARNING, "the transcript was not kept: too many wait for the disk", **fields)
            return
        store, frames, facts = self._store, stream.frames, _facts(task)

        def write() -> Put:
            return store.put(_transcript(facts, frames))

        def written(future: Future[Put]) -> None:
            self._places.release()
            _report(future, fields)

        store.database.submit(write).add_done_callback(written)


def _facts(task: Task) -> dict[str, Any]:
    """What the frames do not say. No prompt: it was forgotten when the task ended."""
    facts = {"task_id": task.task_id, "session_id": task.request.session_id, "state": task.state.value}
    return facts | {"pool_id": task.pool_id, "replica_id": task.replica_id, "model_ref": task.request.model_ref}


def _transcript(facts: dict[str, Any], frames: Sequence[bytes]) -> Artifact:
    """The frames by the names of their events; of `token` frames the texts, since `i` is their place."""
    content: dict[str, Any] = {**facts, "tokens": []}
    for frame in frames:
        _, name, data, *_ = frame.decode().split("\n")
        payload = msgspec.json.decode(data.removeprefix("data: "))
        match name.removeprefix("event: "):
            case "token":
                content["tokens"].append(payload["t"])
            case "started" | "end" | "error" as key:
                content[key] = payload
    return Artifact(kind=ArtifactKind.TRACE, content=content, tags=[f"task:{facts['task_id']}"])


def _report(future: Future[Put], fields: dict[str, Any]) -> None:
    error = future.exception()
    if error is None:
        event(log, logging.INFO, "the transcript was kept", artifact_id=future.result().ref.id, **fields)
        _note_trust_gap(future.result())
    elif isinstance(error, LlorchError):
        event(log, logging.WARNING, f"the transcript was not kept: {error.message}", code=error.code.value, **fields)
    else:
        log.error("the transcript of task %s was not kept", fields["task_id"], exc_info=error)


def _note_trust_gap(put: Put) -> None:
    """HP-ART-2: accepted, and on the record."""
    if put.is_new:
        event(
            log,
            logging.WARNING,
            f"artifact {put.ref.id} is unsigned: nothing proves who made it",
            artifact_id=put.ref.id,
            kind=put.ref.kind.value,
        )
