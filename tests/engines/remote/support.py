"""Workers of the engine under test, attached to a scripted server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from llama_orch.contract.config import OpenaiServerSettings
from llama_orch.engines.base import ReplicaSpec
from llama_orch.engines.remote.engine import RemoteEngine
from llama_orch.engines.remote.worker import RemoteWorker
from tests.engines.remote.upstream import MODEL, Answer, Upstream, an_upstream
from tests.outbound.stand_in import Door, a_door

KEY = "key-0123456789"


def a_remote_spec(model: str = MODEL) -> ReplicaSpec:
    return ReplicaSpec("far-0", "far", None, slots=8, ctx=4096, backend="remote", model=f"openai:box/{model}")


def an_engine(upstream: Upstream, door: Door | None = None, **settings: Any) -> RemoteEngine:
    """The lists of its door name no address: the configuration of the server does."""
    server = OpenaiServerSettings(**{"name": "box", "base_url": upstream.url, **settings})
    engine = RemoteEngine([server])
    engine.door = (door or a_door(allow=[])).outbound
    return engine


def a_key_file(folder: Path, key: str = KEY, mode: int = 0o600) -> Path:
    path = folder / "box.key"
    path.write_text(key + "\n")
    path.chmod(mode)
    return path


@asynccontextmanager
async def attached(
    answers: dict[str, list[Answer]] | None = None, **settings: Any
) -> AsyncIterator[tuple[RemoteWorker, Upstream]]:
    async with an_upstream(answers) as upstream:
        worker = await an_engine(upstream, **settings).launch(a_remote_spec())
        await worker.ready()
        yield worker, upstream
