"""The fetches of the catalog's models: one at a time, taken up again after a restart, and never a partial file where a
whole one belongs."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Protocol

import msgspec
from msgspec import structs

from llama_orch.contract.models import FetchState, ModelFetch
from llama_orch.errors import LlorchError, PolicyDenied, UpstreamFailed
from llama_orch.models import trust
from llama_orch.models.catalog import Entry, Finding
from llama_orch.models.digest import file_key
from llama_orch.outbound.door import Outbound
from llama_orch.runtime.decoding import Spawn
from llama_orch.runtime.download import Download, url_of
from llama_orch.runtime.hashing import Examine
from llama_orch.stores.database import sync_folder
from llama_orch.stores.failures import translated

log = logging.getLogger("llama_orch.catalog")

AT_ONCE = 1
PROGRESS_S = 0.2  # between two frames of a stream


class Keeper(Protocol):
    """What the fetches need of the catalog."""

    async def fetched(self, entry: Entry, file: str, finding: Finding) -> None:
        """The whole file is there under its final name."""

    async def fetch_failed(self, entry: Entry) -> None:
        """It is not asked for any more."""


class Fetch:
    """One fetch as it goes on."""

    def __init__(self) -> None:
        self.state = FetchState.QUEUED
        self.received_bytes = 0
        self.total_bytes: int | None = None
        self.error: str | None = None
        self.version = 0  # counts changes, so that no reader misses one
        self.changed = asyncio.Event()
        self.task: asyncio.Task[None] | None = None

    def progress(self, received_bytes: int, total_bytes: int | None) -> None:
        self.received_bytes, self.total_bytes = received_bytes, total_bytes
        self.tell()

    def tell(self) -> None:
        self.version += 1
        self.changed.set()
        self.changed = asyncio.Event()

    def put(self, state: FetchState, error: str | None = None) -> None:
        self.state, self.error = state, error
        self.tell()

    @property
    def is_over(self) -> bool:
        return self.state in (FetchState.DONE, FetchState.FAILED)

    def view(self) -> ModelFetch:
        return ModelFetch(
            state=self.state, received_bytes=self.received_bytes, total_bytes=self.total_bytes, error=self.error
        )


def at_rest(entry: Entry) -> ModelFetch:
    """Of a model of which nothing is under way."""
    size = None if entry.sight is None else entry.sight.size_bytes
    is_there = not entry.is_fetched or entry.file is not None
    state = FetchState.DONE if is_there else FetchState.NONE
    return ModelFetch(state=state, received_bytes=size or 0, total_bytes=size, error=None)


class Fetches:
    """`folder` holds what was fetched; partial files are in `partial` below it."""

    def __init__(
        self,
        folder: Path,
        outbound: Outbound,
        examine: Examine,
        keeper: Keeper,
        wall: Callable[[], float],
        env: Mapping[str, str] = os.environ,
    ) -> None:
        self.folder = folder
        self._outbound = outbound
        self._examine = examine
        self._keeper = keeper
        self._wall = wall
        self._env = env
        self._by_model: dict[str, Fetch] = {}
        self._turn = asyncio.Semaphore(AT_ONCE)

    def of(self, entry: Entry) -> Fetch | None:
        return self._by_model.get(entry.id)

    def view(self, entry: Entry) -> ModelFetch:
        """A file of this machine is there."""
        if (fetch := self._by_model.get(entry.id)) is not None:
            return fetch.view()
        return at_rest(entry)

    async def check(self, entry: Entry) -> None:
        """Refuse what can be refused at once. Raises PolicyDenied."""
        decision = await self._outbound.check(url_of(entry.source, self._env)[0], "model")
        if not decision.is_allowed:
            raise PolicyDenied(
                f"the outbound policy denies this fetch: {decision.reason}",
                policy_label=decision.rule,
                details={"audit_id": decision.audit_id},
            )

    def start(self, entry: Entry, spawn: Spawn) -> None:
        """Nothing where it is under way, or done."""
        known = self._by_model.get(entry.id)
        if entry.file is not None or (known is not None and not known.is_over):
            return
        fetch = self._by_model[entry.id] = Fetch()
        fetch.task = spawn(self._run(entry, fetch), f"fetch of {entry.id}")

    def stop(self, entry: Entry) -> None:
        """Its entry is deleted. What was fetched of it goes."""
        fetch = self._by_model.pop(entry.id, None)
        if fetch is not None and fetch.task is not None:
            fetch.task.cancel()
        for path in (self._partial(entry), self._partial(entry).with_suffix(".json")):
            path.unlink(missing_ok=True)
        if entry.file is not None:
            (self.folder / entry.file).unlink(missing_ok=True)

    def _partial(self, entry: Entry) -> Path:
        """The same for the same declaration, whatever its id."""
        name = sha256(f"{entry.id}|{entry.source}|{entry.declared.digest}".encode()).hexdigest()[:32]
        return self.folder / "partial" / f"{name}.part"

    async def _run(self, entry: Entry, fetch: Fetch) -> None:
        try:
            async with self._turn:
                fetch.put(FetchState.RUNNING)
                await self._fetch(entry, fetch)
        except LlorchError as error:
            log.warning("the fetch of model %s failed: %s", entry.id, error.message)
            fetch.put(FetchState.FAILED, error.message)
            await self._keeper.fetch_failed(entry)
        else:
            log.info("model %s was fetched: %d bytes", entry.id, fetch.received_bytes)
            fetch.put(FetchState.DONE)

    async def _fetch(self, entry: Entry, fetch: Fetch) -> None:
        partial = self._partial(entry)
        with translated("the folder of models"):
            partial.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            sizes = [m.size_bytes for m in entry.declared.manifests if m.size_bytes is not None]
            size = sizes[0] if sizes else None
            download = Download(self._outbound, entry.source, partial, fetch.progress, size_bytes=size, env=self._env)
            await download.run()
            finding = await self._examine(partial, lambda *_: None, self._wall)
            problems = trust.contradictions(entry.declared, finding)
            if finding.error is not None or problems:
                download.discard()
                raise UpstreamFailed(f"what was fetched is not what was declared: {finding.error or problems[0]}")
            file = f"{entry.id}-{str(finding.digest)[7:23]}.gguf"
            key = await asyncio.to_thread(self._keep, partial, self.folder / file)
        await self._keeper.fetched(entry, file, structs.replace(finding, key=key))

    def _keep(self, partial: Path, path: Path) -> str:
        """Give the whole file its final name, for good; the key of what it is then."""
        partial.replace(path)
        partial.with_suffix(".json").unlink(missing_ok=True)
        sync_folder(self.folder)
        return file_key(path)


class FetchReader:
    """One reader of one fetch's progress, as api/sse.py wants it."""

    def __init__(self, view: Callable[[], ModelFetch], fetch: Fetch | None) -> None:
        self._view = view
        self._fetch = fetch
        self._number = 0
        self._seen = 0
        self._is_over = False

    async def batch(self) -> bytes | None:
        """The present state; from the second one on a moment after it has changed."""
        if self._is_over:
            return None
        if self._number and self._fetch is not None:
            if self._fetch.version == self._seen:
                await self._fetch.changed.wait()
            if not self._fetch.is_over:
                await asyncio.sleep(PROGRESS_S)
        self._seen = 0 if self._fetch is None else self._fetch.version
        self._is_over = self._fetch is None or self._fetch.is_over
        frame = b"id: %d\nevent: progress\ndata: %b\n\n" % (self._number, msgspec.json.encode(self._view()))
        self._number += 1
        return frame

    def close(self) -> None:
        self._is_over = True
