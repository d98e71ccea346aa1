"""The fetches of the catalog's models: one at a time, taken up again after a restart, and never a partial file where a
whole one belongs. Of several processes on one home folder one fetches at a time."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec
from msgspec import structs

from llama_orch.contract.models import FetchState, ModelFetch
from llama_orch.errors import Internal, LlorchError, PolicyDenied, UpstreamFailed
from llama_orch.models import trust
from llama_orch.models.catalog import Entry, Finding
from llama_orch.models.digest import file_key
from llama_orch.outbound.door import Outbound
from llama_orch.runtime.decoding import Spawn
from llama_orch.runtime.download import Download, note_of, url_of
from llama_orch.runtime.hashing import Examine
from llama_orch.stores.database import sync_folder
from llama_orch.stores.failures import translated

log = logging.getLogger("llama_orch.catalog")

AT_ONCE = 1
PROGRESS_S = 0.2  # between two frames of a stream
OTHERS_S = 1.0  # between two looks whether another process has ended its fetch

T = TypeVar("T")


class Keeper(Protocol):
    """What the fetches need of the catalog."""

    async def fetched(self, entry: Entry, file: str, finding: Finding) -> None:
        """The whole file is there under its final name."""

    async def fetch_failed(self, entry: Entry, failure: LlorchError) -> None:
        """It is not asked for any more."""


class Fetch:
    """One fetch as it goes on."""

    def __init__(self, wall: Callable[[], float]) -> None:
        self._wall = wall
        self.state = FetchState.QUEUED
        self.received_bytes = 0
        self.total_bytes: int | None = None
        self._began: tuple[float, int] | None = None  # seconds of the wall clock, and what was there then
        self.error: str | None = None
        self.version = 0  # counts changes, so that no reader misses one
        self.changed = asyncio.Event()
        self.task: asyncio.Task[None] | None = None

    def left_s(self) -> float | None:
        """How much longer it takes, by its speed so far; None where that is not known."""
        if self._began is None or self.total_bytes is None:
            return None
        began_s, had_bytes = self._began
        speed = (self.received_bytes - had_bytes) / max(0.001, self._wall() - began_s)
        return (self.total_bytes - self.received_bytes) / speed if speed > 0 else None

    def progress(self, received_bytes: int, total_bytes: int | None) -> None:
        if self._began is None:
            self._began = self._wall(), received_bytes
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
    absent = FetchState.QUEUED if entry.is_fetch_due else FetchState.NONE  # taken up in a moment, after a start
    state = FetchState.DONE if is_there else absent
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

    def is_under_way(self, entry: Entry) -> bool:
        fetch = self._by_model.get(entry.id)
        return fetch is not None and not fetch.is_over

    def view(self, entry: Entry) -> ModelFetch:
        """A file of this machine is there."""
        if (fetch := self._by_model.get(entry.id)) is not None:
            return fetch.view()
        return at_rest(entry)

    async def check(self, source: str) -> None:
        """Refuse what can be refused at once. Raises PolicyDenied, InvalidParams."""
        decision = await self._outbound.check(url_of(source, self._env)[0], "model")
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
        fetch = self._by_model[entry.id] = Fetch(self._wall)
        fetch.task = spawn(self._run(entry, fetch), f"fetch of {entry.id}")

    async def stop(self, entry: Entry) -> None:
        """Its entry is deleted. What was fetched of it goes, once nobody writes there any more."""
        fetch = self._by_model.pop(entry.id, None)
        if fetch is not None and fetch.task is not None and not fetch.is_over:
            fetch.task.cancel()
            await asyncio.wait((fetch.task,))
            fetch.put(FetchState.FAILED, "the model was deleted")
        # Also a whole file that got its name just now, which nobody has written down yet.
        files = [*self._files_of(entry), *self.folder.glob(f"{entry.id}-{'[0-9a-f]' * 16}.gguf")]
        await asyncio.to_thread(self._remove, files)

    def sweep(self, entries: Iterable[Entry]) -> int:
        """Remove what none of the entries has: what a kill in the middle of a deletion has left. The number of files.
        For the one process that may know of every entry."""
        kept = {path for entry in entries for path in self._files_of(entry)}
        found = [*self.folder.glob("*"), *self._partials.glob("*")] if self.folder.is_dir() else []
        return self._remove(path for path in found if path not in kept and path != self._partials)

    def _remove(self, paths: Iterable[Path]) -> int:
        """What cannot be removed stays for the next sweep."""
        removed = 0
        for path in paths:
            try:
                path.unlink()
                removed += 1
            except FileNotFoundError:
                continue
            except OSError as error:
                log.warning("%s could not be removed: %s", path.name, error.strerror)
        return removed

    @property
    def _partials(self) -> Path:
        return self.folder / "partial"

    def _partial(self, entry: Entry) -> Path:
        """The same for the same declaration, whatever becomes of its entry."""
        name = sha256(f"{entry.id}|{entry.source}|{entry.declared.digest}".encode()).hexdigest()[:32]
        return self._partials / f"{name}.part"

    def _whole(self, entry: Entry, digest: str) -> Path:
        return self.folder / f"{entry.id}-{digest[7:23]}.gguf"

    def _files_of(self, entry: Entry) -> list[Path]:
        """All that may be there of it now."""
        if not entry.is_fetched:
            return []
        if entry.file is not None:
            return [self.folder / entry.file]
        partial = self._partial(entry)
        whole = [] if entry.declared.digest is None else [self._whole(entry, entry.declared.digest)]
        return [partial, note_of(partial), *whole]

    async def _run(self, entry: Entry, fetch: Fetch) -> None:
        try:
            async with self._turn, self._alone():
                fetch.put(FetchState.RUNNING)
                await self._fetch(entry, fetch)
        except LlorchError as error:
            log.warning("the fetch of model %s failed: %s", entry.id, error.message)
            fetch.put(FetchState.FAILED, error.message)
            await self._keeper.fetch_failed(entry, error)
        except Exception:  # one fetch must not end the service
            log.exception("the fetch of model %s failed in an unforeseen way", entry.id)
            failure = Internal("the fetch failed inside the service, which is a defect; its log says how")
            fetch.put(FetchState.FAILED, failure.message)
            await self._keeper.fetch_failed(entry, failure)
        else:
            log.info("model %s was fetched: %d bytes", entry.id, fetch.received_bytes)
            fetch.put(FetchState.DONE)

    @contextlib.asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        """No other process writes to the partial files meanwhile. The kernel lets go of the lock with the process."""
        with translated("the folder of models"):
            for folder in (self.folder, self._partials):
                folder.mkdir(mode=0o700, exist_ok=True)
            descriptor = os.open(self._partials, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            while not _locked(descriptor):  # noqa: ASYNC110  # another process has no event of ours
                await asyncio.sleep(OTHERS_S)
            yield
        finally:
            os.close(descriptor)

    async def _fetch(self, entry: Entry, fetch: Fetch) -> None:
        partial = self._partial(entry)
        with translated("the folder of models"):
            if await self._was_kept(entry, fetch):
                return
            sizes = [m.size_bytes for m in entry.declared.manifests if m.size_bytes is not None]
            size = sizes[0] if sizes else None
            download = Download(self._outbound, entry.source, partial, fetch.progress, size_bytes=size, env=self._env)
            await download.run()
            finding = await self._examine(partial, lambda *_: None, self._wall)
            problems = trust.contradictions(entry.declared, finding)
            if finding.error is not None or problems:
                download.discard()
                raise UpstreamFailed(f"what was fetched is not what was declared: {finding.error or problems[0]}")
            whole = self._whole(entry, str(finding.digest))
            key = await _to_its_end(asyncio.to_thread(self._keep, partial, whole))
        await self._keeper.fetched(entry, whole.name, structs.replace(finding, key=key))

    async def _was_kept(self, entry: Entry, fetch: Fetch) -> bool:
        """Whether the whole file had its name when the service was killed, before that could be written down."""
        if entry.declared.digest is None or not (whole := self._whole(entry, entry.declared.digest)).is_file():
            return False
        finding = await self._examine(whole, lambda *_: None, self._wall)
        if finding.error is not None or trust.contradictions(entry.declared, finding):
            return False
        await self._keeper.fetched(entry, whole.name, finding)
        fetch.progress(finding.size_bytes or 0, finding.size_bytes)
        return True

    def _keep(self, partial: Path, path: Path) -> str:
        """Give the whole file its final name, for good; the key of what it is then."""
        partial.replace(path)
        note_of(partial).unlink(missing_ok=True)
        sync_folder(self.folder)
        return file_key(path)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


async def _to_its_end(work: Coroutine[Any, Any, T]) -> T:
    """A thread cannot be stopped: whoever is canceled waits for it."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait((task,))
        raise


class FetchReader:
    """One reader of one fetch's progress, as api/sse.py wants it."""

    def __init__(self, view: Callable[[], ModelFetch], fetch: Fetch | None, on_close: Callable[[], None]) -> None:
        self._view = view
        self._on_close = on_close
        self._is_open = True
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
        if self._is_open:
            self._is_open = False
            self._on_close()
