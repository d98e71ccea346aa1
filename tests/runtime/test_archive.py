"""Transcripts of finished streams, and the trust gap in the log."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from llama_orch.contract.config import PoolSettings, TasksSettings
from llama_orch.contract.models import Artifact, ArtifactKind, StoredArtifact, TaskState
from llama_orch.engines.simulated import ServiceModel
from llama_orch.errors import InvalidParams, StorageUnavailable
from llama_orch.runtime import archive
from llama_orch.runtime.archive import Archive
from llama_orch.stores.artifacts import ArtifactStore
from llama_orch.stores.database import Database
from llama_orch.testing.builders import a_task
from llama_orch.testing.loop import run
from llama_orch.testing.rehearsal import Stage, a_rehearsal, read_all, settings_for

from .frames import parse, text

FAST = ServiceModel(load_s=0.0, prefill_s_per_token=0.0, decode_s_per_token=0.01)
KEEP = TasksSettings(keep_transcripts=True)


def a_store(home: Path) -> ArtifactStore:
    return ArtifactStore(Database(home / "state.sqlite3"), home / "artifacts", lambda: 1.0)


def rehearse(
    scenario: Callable[[Stage], Awaitable[None]], store: ArtifactStore | None, tasks: TasksSettings | None = None
) -> list[StoredArtifact]:
    """Run the scenario in virtual time; the artifacts that are there once the store was closed, oldest first."""

    async def main() -> None:
        settings = settings_for(PoolSettings(slots=1), tasks=tasks or TasksSettings())
        async with a_rehearsal(settings, model=FAST, artifacts=store) as stage:
            await scenario(stage)

    run(main())
    if store is None:
        return []
    store.database.close()
    page = store.list(kind=None, tag=None, parent=None, limit=200, cursor=None)
    found = [store.get(ref.id) for ref in reversed(page.items)]
    store.database.close()
    return found


async def finish(stage: Stage, **fields: Any) -> str:
    admission = await stage.service.submit(a_task(**{"max_tokens": 5, "seed": 7, **fields}))
    await read_all(stage.service.open_stream(admission.task_id, -1))
    return admission.task_id


@pytest.mark.spec("HP-ART-4")
def test_a_transcript_has_the_streams_tokens_and_its_end(tmp_path: Path) -> None:
    seen: list[Any] = []

    async def scenario(stage: Stage) -> None:
        task_id = await finish(stage, keep_transcript=True, prompt="a secret plan")
        seen.extend(parse(await read_all(stage.service.open_stream(task_id, -1))))

    (trace,) = rehearse(scenario, a_store(tmp_path))
    task_id = seen[0].data["task_id"]
    assert (trace.kind, trace.tags) == (ArtifactKind.TRACE, [f"task:{task_id}"])
    content = trace.content
    assert "".join(content["tokens"]) == text(seen)
    assert (content["started"], content["end"]) == (seen[0].data, seen[-1].data)
    assert (content["task_id"], content["state"], content["pool_id"]) == (task_id, "succeeded", "default")
    assert "a secret plan" not in str(content)  # the stream's transcript, and no more


@pytest.mark.spec("HP-ART-4")
@pytest.mark.parametrize(
    ("keeps", "asked", "is_kept"),
    [(False, None, False), (False, True, True), (True, None, True), (True, False, False), (False, False, False)],
)
def test_the_task_says_else_the_configuration(tmp_path: Path, keeps: bool, asked: bool | None, is_kept: bool) -> None:
    async def scenario(stage: Stage) -> None:
        await finish(stage, keep_transcript=asked)

    found = rehearse(scenario, a_store(tmp_path), TasksSettings(keep_transcripts=keeps))
    assert len(found) == is_kept


@pytest.mark.spec("HP-ART-4")
def test_a_canceled_stream_has_a_transcript_too(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        admission = await stage.service.submit(a_task(max_tokens=1000))
        await asyncio.sleep(0.1)
        await stage.service.cancel(admission.task_id)

    (trace,) = rehearse(scenario, a_store(tmp_path), KEEP)
    assert trace.content["error"]["code"] == "CANCELED"
    assert (trace.content["state"], "end" in trace.content) == ("canceled", False)


@pytest.mark.spec("HP-ART-4")
def test_what_ends_with_the_service_is_written(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        for _ in range(3):
            await stage.service.submit(a_task(max_tokens=1000))

    found = rehearse(scenario, a_store(tmp_path), KEEP)
    # Two waited, and one ran.
    assert sorted(trace.content["state"] for trace in found) == ["canceled", "failed", "failed"]


@pytest.mark.spec("HP-ART-4")
def test_a_disk_that_fails_is_logged_and_the_task_is_none_the_worse(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(stage: Stage) -> None:
        task_id = await finish(stage)
        assert stage.service.get_task(task_id).state is TaskState.SUCCEEDED

    store = a_store(tmp_path / "absent")
    with pytest.raises(StorageUnavailable):
        rehearse(scenario, store, KEEP)
    assert any("the transcript was not kept: the store" in record.message for record in caplog.records)


@pytest.mark.spec("HP-ART-4")
def test_a_disk_that_hangs_does_not_hold_tasks_up_and_its_queue_is_bounded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "TRANSCRIPTS_WAITING_MAX", 2)
    store = a_store(tmp_path)
    answers = threading.Event()
    store.database.submit(answers.wait)

    async def scenario(stage: Stage) -> None:
        for _ in range(4):
            await finish(stage)
        answers.set()

    assert len(rehearse(scenario, store, KEEP)) == 2
    dropped = [record for record in caplog.records if "too many wait for the disk" in record.message]
    assert len(dropped) == 2


def test_without_a_store_a_transcript_is_refused_and_artifacts_are_unavailable() -> None:
    """To take `keep_transcript` and not to keep it would be a lie; false is fine."""

    async def scenario(stage: Stage) -> None:
        await finish(stage, keep_transcript=False)
        with pytest.raises(InvalidParams, match="leave `keep_transcript` out"):
            await stage.service.submit(a_task(keep_transcript=True))
        with pytest.raises(StorageUnavailable, match="without a store"):
            await stage.service.get_artifact("x")

    rehearse(scenario, None)


@pytest.mark.spec("HP-ART-2")
def test_an_unsigned_artifact_is_accepted_and_the_trust_gap_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = a_store(tmp_path)
    kept = Archive(store, keeps_transcripts=False)

    async def main() -> str:
        artifact = Artifact(kind=ArtifactKind.PLAN, content={"a": 1})
        ref, is_new = await kept.put(artifact)
        assert is_new
        assert await kept.put(artifact) == (ref, False)  # nothing new to be wary of
        return ref.id

    with caplog.at_level(logging.INFO):
        artifact_id = asyncio.run(main())
    store.database.close()
    (record,) = [record for record in caplog.records if "unsigned" in record.message]
    assert record.levelno == logging.WARNING
    assert record.__dict__["fields"] == {"artifact_id": artifact_id, "kind": "plan"}
