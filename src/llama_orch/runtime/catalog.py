"""The catalog at work: entries, their state, their verification (HP-CTL-1, HP-CTL-3, HP-CTL-4).

Invariants: what was answered is on the disk; the book in memory says what the disk says; changes come one after the
other. Whoever serves models is told of every change and draws the consequences (bars.py).
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path

from msgspec import structs

from llama_orch.contract.config import Settings
from llama_orch.contract.models import CatalogModelRequest, ModelState
from llama_orch.errors import (
    Conflict,
    InvalidParams,
    LlorchError,
    NotFound,
    PolicyDenied,
    StorageUnavailable,
    UntrustedArtifact,
)
from llama_orch.models import trust
from llama_orch.models.catalog import CatalogBook, Entry, Finding, Sight
from llama_orch.models.digest import file_key
from llama_orch.models.references import FileRoots, ModelNotFound
from llama_orch.models.trust import Judgement
from llama_orch.observe.catalog import CatalogJournal
from llama_orch.runtime.decoding import Spawn
from llama_orch.runtime.download import url_of
from llama_orch.runtime.fetches import Fetches
from llama_orch.runtime.hashing import Examine, Hashing
from llama_orch.runtime.records import Records

log = logging.getLogger("llama_orch.catalog")

ENTRIES_MAX = 4096
HASHED_AT_ONCE = 1  # a disk reads one file fastest
HURRIED_AT_ONCE = 4  # with those that tasks wait for

# A model from elsewhere whose file is there, or does not come, and why.
Settled = Callable[[Entry, LlorchError | None], Awaitable[None]]
# A reference -> its file as it is, and where it is. Raises ModelNotFound. Does not hold up the event loop.
Glance = Callable[[str], Awaitable[tuple[Sight, Path]]]


class Catalog:
    """One service's catalog. `is_known` False: the book could not be read yet, and is read before anything is done with
    it. `is_alone`: the book has every entry, and no other service works in its folder. `wall` gives seconds since the
    epoch."""

    def __init__(
        self,
        book: CatalogBook,
        records: Records,
        glance: Glance,
        examine: Examine,
        settings: Settings,
        wall: Callable[[], float],
        journal: CatalogJournal,
        *,
        is_known: bool = True,
        is_alone: bool = False,
    ) -> None:
        self.book = book
        self._is_alone = is_alone
        self.policy = settings.catalog.trust_policy
        self.roots = FileRoots(settings.catalog.file_roots)
        self._configured = {pool.model for pool in settings.pools}
        self._records = records
        self._glance = glance
        self._examine = examine
        self._wall = wall
        self._journal = journal
        self._is_known = is_known
        self.fetches: Fetches | None = None  # where there is a place for files from elsewhere
        self._turn = asyncio.Lock()
        self._queue: deque[str] = deque()  # of those that wait for their verification
        self._hashers = 0
        self._under_way: dict[str, Hashing] = {}
        self._spawn: Spawn | None = None
        self._changed: Callable[[], None] = lambda: None
        self._settled: Settled | None = None

    def bind(self, spawn: Spawn, changed: Callable[[], None], settled: Settled) -> None:
        """From now on `changed` is called after each change, and `settled` once a fetch has come to its end."""
        self._spawn, self._changed, self._settled = spawn, changed, settled

    async def begin(self) -> None:
        """Look for all files, and do what was asked for before the service ended."""
        if self._is_alone and self.fetches is not None:
            swept = await asyncio.to_thread(self.fetches.sweep, self.book)
            if swept:
                log.info("%d files that no model has any more were removed", swept)
        for entry in self.book:
            await self._take_up(entry)

    async def _take_up(self, entry: Entry) -> None:
        await self._look_again(entry)
        if entry.is_due:
            self.start(entry)
        if entry.is_fetch_due:
            self._start_fetch(entry)

    async def _look_again(self, entry: Entry) -> None:
        """Where its file is now, and whether it is still the one that was verified."""
        if entry.is_fetched and entry.file is None:
            return
        try:
            _, path = await self._glance(self._where(entry))
            self.book.put_path(entry, path)
            is_stale = entry.finding is not None and entry.finding.key != file_key(path)
        except (ModelNotFound, OSError) as error:
            log.warning("the file of model %s is not there: %s", entry.id, error)
            self.book.put_path(entry, None)
            is_stale = entry.finding is not None
        if is_stale:
            self.unverified(entry)

    async def _known(self) -> None:
        """See to it that the book was read. Raises StorageUnavailable."""
        if not self._is_known:
            for entry in await self._records.load():
                self.book.put(entry)
                await self._take_up(entry)
            self._is_known = True
            self._changed()

    # -- entries -----------------------------------------------------------------------------------------------------

    async def create(self, request: CatalogModelRequest) -> tuple[Entry, bool]:
        """The entry, and whether it is new."""
        async with self._turn:
            await self._known()
            if (earlier := self.book.get(request.id)) is not None:
                if earlier.declared != request:
                    raise Conflict(
                        f"the catalog has another model {request.id!r}; choose another id or delete that one"
                    )
                return earlier, False
            if len(self.book) >= ENTRIES_MAX:
                raise Conflict(f"the catalog holds {ENTRIES_MAX} models, which is the limit; delete some")
            self._check_source(request)
            entry = Entry(number=self.book.next_number(), declared=request, created_s=self._wall())
            path: Path | None = None
            if entry.is_fetched:
                url_of(entry.source, {})
            else:
                entry, path = await self._sighted(entry)
            await self._records.put(entry)
            self.book.put(entry)
            self.book.put_path(entry, path)
        self._journal.entered(entry)
        self._changed()
        return entry, True

    async def _sighted(self, entry: Entry) -> tuple[Entry, Path]:
        try:
            sight, path = await self._glance(entry.source)
        except ModelNotFound as error:
            raise InvalidParams(f"`source_url`: {error}") from error
        return structs.replace(entry, sight=sight), path

    def file_of(self, entry: Entry) -> Path | None:
        """The file that was fetched for it."""
        return None if entry.file is None or self.fetches is None else (self.fetches.folder / entry.file).resolve()

    def _where(self, entry: Entry) -> str:
        """The file's own reference."""
        is_here = entry.file is not None and self.fetches is not None
        return f"file:{self.fetches.folder / entry.file}" if is_here else entry.source  # type: ignore[union-attr, operator]

    def _check_source(self, request: CatalogModelRequest) -> None:
        if not self.may_be_named(request.source_url):
            raise PolicyDenied("`source_url` names a file that is below none of `catalog.file_roots`")
        registry = trust.foreign_registry(request.source_url, self.policy)
        if registry is not None and self.policy.mode == "strict":
            raise UntrustedArtifact(f"{registry} is none of `catalog.trust_policy.allowed_registries`")

    def may_be_named(self, source: str) -> bool:
        """Whether whoever has the token may have this file: files of this machine only where a person said so."""
        kind, _, rest = source.partition(":")
        return kind != "file" or source in self._configured or self.roots.admit(Path(rest))

    async def entries(self) -> list[Entry]:
        """All of them, in the order in which they were made."""
        await self._known()
        return list(self.book)

    async def get(self, model_id: str) -> Entry:
        await self._known()
        entry = self.book.get(model_id)
        if entry is None:
            raise NotFound(f"the catalog has no model {model_id!r}")
        return entry

    async def remove(self, model_id: str, serving: Callable[[Entry], str | None]) -> None:
        """`serving` says what still needs the entry, in words."""
        async with self._turn:
            entry = await self.get(model_id)
            if (hindrance := serving(entry)) is not None:
                raise Conflict(f"model {model_id!r} is served: {hindrance}")
            await self._records.remove(model_id)
            self.book.remove(entry)
            if self.fetches is not None and entry.is_fetched:
                await self.fetches.stop(entry)
        await self._tell(entry, NotFound(f"model {model_id!r} was deleted from the catalog"))
        self._journal.removed(entry)
        self._changed()

    async def put_in_state(self, model_id: str, state: ModelState) -> Entry:
        async with self._turn:
            entry = await self._changed_to(await self.get(model_id), state=state)
        self._journal.put_in_state(entry)
        self._changed()
        return entry

    async def _changed_to(self, entry: Entry, **changes: object) -> Entry:
        """First on the disk, then in the book."""
        changed = structs.replace(entry, **changes)
        await self._records.put(changed)
        self.book.put(changed)
        return changed

    # -- files from elsewhere ----------------------------------------------------------------------------------------

    async def fetch(self, model_id: str) -> Entry:
        """Begin a fetch, or look on at the one that is under way. Nothing where the file is there. Raises
        PolicyDenied."""
        entry = await self.get(model_id)
        if not entry.is_fetched or entry.file is not None:
            return entry
        if self.fetches is None:
            raise PolicyDenied("this service keeps no files from elsewhere")
        await self.fetches.check(entry.source)
        async with self._turn:
            entry = await self.get(model_id)
            if entry.file is None:
                entry = await self._changed_to(entry, is_fetch_due=True)
                self._start_fetch(entry)
        return entry

    def _start_fetch(self, entry: Entry) -> None:
        if self.fetches is not None and self._spawn is not None:
            self.fetches.start(entry, self._spawn)

    async def fetched(self, entry: Entry, file: str, finding: Finding) -> None:
        """The whole file is there under its final name, and is what was declared as far as that goes."""
        async with self._turn:
            now = self.book.get(entry.id)
            if now is None or now.number != entry.number:
                return
            here = structs.replace(now, file=file)
            try:
                sight, path = await self._glance(self._where(here))
            except ModelNotFound as error:
                raise StorageUnavailable("the file that was fetched is gone again; fetch it once more") from error
            entry = await self._changed_to(here, finding=finding, sight=sight, is_fetch_due=False)
            self.book.put_path(entry, path)
        self._journal.verified(entry, trust.judge(entry.declared, finding, self.policy))
        self._changed()
        await self._tell(entry, None)

    async def _tell(self, entry: Entry, error: LlorchError | None) -> None:
        if self._settled is not None and entry.is_fetched:
            await self._settled(entry, error)

    async def fetch_failed(self, entry: Entry, failure: LlorchError) -> None:
        """It is not tried again before somebody asks."""
        async with self._turn:
            now = self.book.get(entry.id)
            if now is not None and now.number == entry.number:
                self.book.put(structs.replace(now, is_fetch_due=False))
                try:
                    await self._records.put(structs.replace(now, is_fetch_due=False))
                except LlorchError as error:
                    log.warning("that the fetch of model %s failed could not be kept: %s", entry.id, error)
        await self._tell(entry, failure)

    # -- verification ------------------------------------------------------------------------------------------------

    def judgement(self, entry: Entry) -> Judgement | None:
        """What was found, by the policy as it is; None before anything was."""
        return None if entry.finding is None else trust.judge(entry.declared, entry.finding, self.policy)

    def under_way(self, entry: Entry) -> Hashing | None:
        return self._under_way.get(entry.id)

    async def verify(self, model_id: str) -> Entry:
        """Begin a verification, or look on at the one that is under way. It will be done, whatever happens."""
        async with self._turn:
            entry = await self.get(model_id)
            if entry.id not in self._under_way:
                entry = await self._changed_to(entry, is_due=True)
                self._start(entry)
        return entry

    async def verified(self, entry: Entry, limit_s: float) -> Entry:
        """The entry once it is verified, or as it is after so many seconds."""
        if (under_way := self._under_way.get(entry.id)) is None:
            under_way = self._start(entry)
        self._hurry(entry.id)
        try:
            async with asyncio.timeout(limit_s):
                await under_way.done.wait()
        except TimeoutError:
            log.info("model %s is still being verified", entry.id)
        return self.book.get(entry.id) or entry

    def unverified(self, entry: Entry) -> Entry:
        """The entry from now on: its file is another one than was verified."""
        now = self.book.get(entry.id)
        if now is None or now.number != entry.number:
            return entry
        changed = structs.replace(now, finding=None)
        self.book.put(changed)
        return changed

    def start(self, entry: Entry) -> None:
        """Begin a verification that is not awaited, unless one is under way."""
        if entry.id not in self._under_way:
            self._start(entry)

    def _start(self, entry: Entry) -> Hashing:
        under_way = self._under_way[entry.id] = Hashing()
        under_way.total_bytes = None if entry.sight is None else entry.sight.size_bytes
        self._queue.append(entry.id)
        self._launch_next()
        return under_way

    def _hurry(self, model_id: str) -> None:
        """A task waits for it."""
        if model_id in self._queue:
            self._queue.remove(model_id)
            self._queue.appendleft(model_id)
            if self._hashers < HURRIED_AT_ONCE:
                self._launch(self._queue.popleft())

    def _launch_next(self) -> None:
        while self._queue and self._hashers < HASHED_AT_ONCE:
            self._launch(self._queue.popleft())

    def _launch(self, model_id: str) -> None:
        if self._spawn is None:
            raise RuntimeError("the catalog is not at work")
        self._hashers += 1
        under_way = self._under_way[model_id]
        under_way.is_running, under_way.began_s = True, self._wall()
        self._spawn(self._verify(model_id, under_way), f"verification of {model_id}")

    async def _verify(self, model_id: str, under_way: Hashing) -> None:
        try:
            entry = self.book.get(model_id)
            if entry is not None:
                await self._found(entry, *await self._examined(entry, under_way))
        finally:
            self._hashers -= 1
            del self._under_way[model_id]
            under_way.done.set()
        self._launch_next()
        self._changed()

    async def _examined(self, entry: Entry, under_way: Hashing) -> tuple[Finding, Sight | None]:
        if not self.may_be_named(entry.source):  # a link leads elsewhere now, or the roots are others
            return Finding(at_s=self._wall(), error="its file is below none of `catalog.file_roots`"), None
        try:
            sight, path = await self._glance(self._where(entry))
        except ModelNotFound as error:
            return Finding(at_s=self._wall(), error=str(error)), None
        self.book.put_path(entry, path)
        return await self._examine(path, under_way.progress, self._wall), sight

    async def _found(self, examined: Entry, finding: Finding, sight: Sight | None) -> None:
        async with self._turn:
            entry = self.book.get(examined.id)
            if entry is None or entry.number != examined.number:  # deleted meanwhile, and perhaps another has its id
                return
            changed = structs.replace(entry, finding=finding, sight=sight, is_due=False)
            if entry.file != examined.file:  # it was fetched meanwhile, and looked at then
                changed = structs.replace(entry, is_due=False)
            self.book.put(changed)  # it holds whether or not it can be kept
            try:
                await self._records.put(changed)
            except LlorchError as error:
                log.warning("the verification of model %s could not be kept: %s", entry.id, error)
        self._journal.verified(changed, trust.judge(changed.declared, changed.finding or finding, self.policy))
