"""What the engine tests share: builders, a worker that is always cleaned up, and waits without sleeping."""

from __future__ import annotations

import asyncio
import os
import select
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from llama_orch.engines.base import Chunk, Completion, Engine, Job, ReplicaSpec, Sampling, Worker

T = TypeVar("T")

PROMPT = "the of and to in is that it was for on are with as his they"


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run a test's coroutine, bounded in time."""

    async def bounded() -> T:
        async with asyncio.timeout(120):
            return await main

    return asyncio.run(bounded())


async def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition that nothing announces."""
    while not condition():
        with suppress(TimeoutError):
            async with asyncio.timeout(0.01):
                await asyncio.Event().wait()


class Watched:
    """A process, pinned so that its end can be waited for whoever its parent is."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._descriptor = os.pidfd_open(pid)

    def is_gone_within(self, seconds: float) -> bool:
        poll = select.poll()
        poll.register(self._descriptor, select.POLLIN)
        return bool(poll.poll(seconds * 1000))


def children(pid: int) -> list[int]:
    """The child processes of a process."""
    return [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]


def a_spec(model: Path, slots: int = 1, ctx: int = 512) -> ReplicaSpec:
    return ReplicaSpec(replica_id="r-1", pool_id="p-1", model_path=model, slots=slots, ctx=ctx)


def a_job(**changes: Any) -> Job:
    sampling = Sampling(**{name: changes.pop(name) for name in list(changes) if name in Sampling.__dataclass_fields__})
    settings: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 24, "seed": 7, "slot": 0} | changes
    return Job(task_id="t-1", sampling=sampling, **settings)


@asynccontextmanager
async def a_worker(engine: Engine, spec: ReplicaSpec) -> AsyncGenerator[Worker, None]:
    """A worker that is ready, and gone afterwards."""
    worker = await engine.launch(spec)
    try:
        await worker.ready()
        yield worker
    finally:
        await worker.stop(grace_s=5)


async def collect(worker: Worker, job: Job) -> tuple[list[Chunk], Completion]:
    """Everything that a job yields."""
    chunks: list[Chunk] = []
    last: list[Completion] = []
    async with aclosing(worker.generate(job)) as stream:
        async for item in stream:
            assert not last, "something came after the completion"
            if isinstance(item, Chunk):
                chunks.append(item)
            else:
                last.append(item)
    assert len(last) == 1
    return chunks, last[0]


def text_of(chunks: list[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)
