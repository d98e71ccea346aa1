"""What the catalog's decisions mean for tasks and pools: who is refused, which pool closes, and which may open again.

A retired model is retired under every name: a pool closes when all entries of its model are retired. That a file is not
what was declared concerns those who name it by that declaration: a task that names the entry, a pool whose model is the
entry. Under a strict policy a pool needs an entry that stands for its model (HP-ADM-7).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from llama_orch.clock import Clock
from llama_orch.contract.models import ReplicaState
from llama_orch.core import refusals
from llama_orch.core.bar import WAIT_MS, Bar, BarKind
from llama_orch.core.pool import Pool
from llama_orch.core.scheduler import Scheduler
from llama_orch.errors import NotFound
from llama_orch.models import trust
from llama_orch.models.catalog import Entry
from llama_orch.models.digest import file_key
from llama_orch.runtime.catalog import Catalog
from llama_orch.runtime.replicas import Replicas

PATIENCE_S = 2.0  # a task waits this long for a verification; then it is told when to come again
_GUESS_BYTES_PER_S = 500e6  # of hashing that nobody has measured yet


class Bars:
    """Between one catalog and one scheduler. `perform` is called after each event."""

    def __init__(
        self, catalog: Catalog, scheduler: Scheduler, replicas: Replicas, clock: Clock, perform: Callable[[], None]
    ) -> None:
        self._catalog = catalog
        self._scheduler = scheduler
        self._replicas = replicas
        self._clock = clock
        self._perform = perform

    # -- one model -----------------------------------------------------------------------------------------------------

    async def check(self, reference: str) -> None:
        """Refuse a task, or a reload, that names a model which may not be served. One that has to be verified first is
        waited for a little."""
        entry = self._catalog.book.find(reference)
        if entry is None or (reference == entry.source and not entry.is_fetched):
            return  # what somebody declared of a file of this machine is no matter of those who name the file itself
        if entry.is_absent:
            if entry.is_retired:
                raise refusals.barred(None, _retired(entry))
            raise NotFound(
                f"the file of model {entry.id!r} was not fetched yet; `llama-orch models fetch {entry.id}`, "
                "or set `on_demand.fetch` in the configuration"
            )
        entry = self._fresh(entry)
        if trust.needs_verification(entry, self._catalog.policy) and not entry.is_retired:
            entry = await self._catalog.verified(entry, PATIENCE_S)
        if (bar := self._bar_of(entry)) is not None:
            raise refusals.barred(None, bar)

    def check_file(self, reference: str, path: Path | None) -> None:
        """The same for a model that no pool has yet, now that its file is known."""
        if (bar := self._bar_of_model((reference,), path)) is not None:
            raise refusals.barred(None, bar)

    def _fresh(self, entry: Entry) -> Entry:
        """Without what was found of a file that is not there any more. A pool that is loaded has what was found."""
        path = self._catalog.book.path(entry)
        if entry.finding is None or any(pool.is_loaded for pool in self._pools_of(entry)):
            return entry
        try:
            is_stale = path is None or file_key(path) != entry.finding.key
        except OSError:
            is_stale = True
        return self._catalog.unverified(entry) if is_stale else entry

    def _bar_of(self, entry: Entry) -> Bar | None:
        if entry.is_retired:
            return _retired(entry)
        if entry.is_absent:
            return None  # there is nothing to look at yet
        if trust.needs_verification(entry, self._catalog.policy):
            wait_ms = self._wait_ms(entry)
            return Bar(BarKind.UNVERIFIED, f"model {entry.id!r} is being verified; repeat in {wait_ms} ms", wait_ms)
        judgement = self._catalog.judgement(entry)
        if judgement is not None and judgement.problems:
            return Bar(BarKind.UNTRUSTED, f"model {entry.id!r} is not trusted: {'; '.join(judgement.problems)}")
        return None

    def _wait_ms(self, entry: Entry) -> int:
        """How long its verification will take, from what was read of the file so far."""
        under_way = self._catalog.under_way(entry)
        total = None if under_way is None else under_way.total_bytes
        if under_way is None or total is None:
            return WAIT_MS
        speed = _GUESS_BYTES_PER_S
        if under_way.began_s is not None and under_way.read_bytes:
            speed = under_way.read_bytes / max(0.001, self._clock.wall() - under_way.began_s)
        return max(WAIT_MS, round((total - under_way.read_bytes) / speed * 1000))

    # -- pools ---------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Before anything is loaded: what may not be served is not loaded either."""
        for pool in list(self._scheduler.pools.values()):
            bar = self._bar_of_pool(pool)
            if bar is not None and bar.is_lasting:
                for replica in pool.replicas.values():
                    if replica.state is ReplicaState.LOADING:
                        replica.mark_unloaded()
            if bar != pool.bar:
                self._put(pool, bar)

    def look_again(self, deadline_s: float | None = None, about: Entry | None = None) -> None:
        """After a change. `deadline_s`: of the tasks of the retired model `about`; None: they may run to their end."""
        for pool in list(self._scheduler.fleet.every_pool()):
            bar = self._bar_of_pool(pool)
            is_meant = about is not None and bar is not None and about in self._entries_of(pool)
            if bar != pool.bar or is_meant:
                self._put(pool, bar, deadline_s if is_meant else None)
        self._perform()

    def _put(self, pool: Pool, bar: Bar | None, deadline_s: float | None = None) -> None:
        self._scheduler.bar_pool(pool, bar, self._clock.now(), deadline_s)
        if bar is not None and bar.kind is BarKind.UNVERIFIED:
            for entry in self._entries_of(pool):
                if trust.needs_verification(entry, self._catalog.policy):
                    self._catalog.start(entry)

    def loaded(self, pool: Pool, digest: str) -> None:
        """A worker has read the file and this is its digest: the last moment at which a file that was changed since it
        was looked at can be kept from serving."""
        wrong = [
            name for name in (pool.spec.model, *pool.spec.aliases) if name.startswith("sha256:") and name != digest
        ]
        entry = self._catalog.book.get(pool.spec.model)
        if entry is not None and entry.finding is not None and entry.finding.digest != digest:
            entry = self._catalog.unverified(entry)
            self._catalog.start(entry)
        if entry is not None and entry.declared.digest not in (None, digest):
            wrong.append(str(entry.declared.digest))
        if wrong:
            reason = f"the file of model {pool.spec.model!r} is not {wrong[0]} any more; it was changed"
            self._scheduler.bar_pool(pool, Bar(BarKind.UNTRUSTED, reason), self._clock.now())

    def hindrance(self, entry: Entry) -> str | None:
        """Why the entry cannot be deleted."""
        for pool in self._pools_of(entry):
            if pool.is_arriving and not pool.is_idle:
                return f"tasks of pool {pool.spec.pool_id} wait for its file; cancel them first"
            is_its_model = pool.spec.model == entry.id or (entry.is_fetched and pool.spec.model == entry.source)
            if is_its_model and not pool.spec.is_on_demand:
                return f"it is the model of pool {pool.spec.pool_id}; reload that with another one first"
            if pool.is_loaded or not pool.is_idle:
                return f"pool {pool.spec.pool_id} has it loaded; retire it, drain the pool or reload it first"
        return None

    def _pools_of(self, entry: Entry) -> list[Pool]:
        return [pool for pool in self._scheduler.fleet.every_pool() if entry in self._entries_of(pool)]

    def _entries_of(self, pool: Pool) -> list[Entry]:
        return self._catalog.book.covering(self._path(pool), _names(pool))

    def _path(self, pool: Pool) -> Path | None:
        replica_id = next(iter(pool.replicas), None)
        return None if replica_id is None else self._replicas.spec(replica_id).model_path

    def _bar_of_pool(self, pool: Pool) -> Bar | None:
        bar = self._bar_of_model(_names(pool), self._path(pool))
        if bar is None and pool.bar is not None and pool.bar.kind is BarKind.UNTRUSTED and pool.is_loaded:
            return pool.bar  # `loaded` has seen the file itself
        return bar

    def _bar_of_model(self, names: Sequence[str], path: Path | None) -> Bar | None:
        """`names`: the model's own first."""
        book = self._catalog.book
        own = book.get(names[0]) or (book.find(names[0]) if names[0].startswith("sha256:") else None)
        if own is not None and (bar := self._bar_of(own)) is not None:
            return bar
        entries = book.covering(path, names)
        if entries and all(entry.is_retired for entry in entries):
            return self._bar_of(entries[0])
        if self._catalog.policy.mode == "permissive" or names[0].startswith("builtin:"):
            return None
        bars = [self._bar_of(entry) for entry in entries]
        if None in bars:
            return None
        lack = Bar(BarKind.UNTRUSTED, f"the trust policy is strict, and the catalog has no entry for {names[0]!r}")
        return next((bar for bar in bars if bar is not None), lack)


def _retired(entry: Entry) -> Bar:
    return Bar(BarKind.RETIRED, f"model {entry.id!r} is retired; use another one, or have it put back in service")


def _names(pool: Pool) -> list[str]:
    names = [pool.spec.model, *pool.spec.aliases]
    return names if pool.model_digest is None else [*names, pool.model_digest]
