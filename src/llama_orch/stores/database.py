"""The SQLite file of the home folder, which all stores share; each has tables of its own.

Invariants: a write that has returned is on the disk, also after kill -9 or a power cut (WAL, full sync); one that has
not is there as a whole or not at all (HP-CTL-5). Several processes may have the file open; one writes at a time.

The file is opened by whoever needs it first, so that a service on a bad disk serves on without its stores, and finds
them again when the disk is well.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import ParamSpec, TypeVar

from llama_orch.errors import StorageUnavailable
from llama_orch.stores.failures import translated

BUSY_LIMIT_S = 5.0  # for another process's write to end
FILE_NAME = "state.sqlite3"

T = TypeVar("T")
P = ParamSpec("P")
Step = Sequence[str]  # statements that take a store's tables from one version to the next


class Database:
    """One connection, used by one thread at a time. Raises StorageUnavailable where the disk does not do."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stores: dict[str, Sequence[Step]] = {}
        self._connection: sqlite3.Connection | None = None
        self._turn = threading.RLock()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="stores")

    @property
    def path(self) -> Path:
        return self._path

    def add_store(self, name: str, steps: Sequence[Step]) -> None:
        """Have `steps` taken that the store has not taken yet, in order, when the file is opened. A step that was ever
        released stays as it is; a change is another step behind it."""
        with self._turn:
            self._stores[name] = steps
            if self._connection is not None:
                self._bring_up_to_date(self._connection, name, steps)

    # -- work, which blocks --------------------------------------------------------------------------------------------

    def read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """`work` sees one state of the file from its beginning to its end."""
        return self._transaction("BEGIN", work)

    def write(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """`work` is alone in changing the file. What it has done is on the disk when this returns, and undone when it
        raises."""
        return self._transaction("BEGIN IMMEDIATE", work)

    def _transaction(self, begin: str, work: Callable[[sqlite3.Connection], T]) -> T:
        with self._turn, translated("the store"):
            connection = self._opened()
            connection.execute(begin)
            try:
                result = work(connection)
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:  # SQLite itself rolls back after some failures
                    connection.execute("ROLLBACK")
                raise
            return result

    # -- the same off the event loop -----------------------------------------------------------------------------------

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a store's method in the stores' thread. Whoever stops waiting leaves it to its end."""
        return await asyncio.wrap_future(self._thread.submit(function, *args, **kwargs))

    def submit(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """The same for a caller that does not wait. `close` still sees it done."""
        return self._thread.submit(function, *args, **kwargs)

    def close(self) -> None:
        """Finish what was submitted; then the file is closed."""
        self._thread.shutdown(wait=True)
        with self._turn:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    # -- opening -------------------------------------------------------------------------------------------------------

    def _opened(self) -> sqlite3.Connection:
        if self._connection is None:
            connection = connect(self._path)
            try:
                for name, steps in self._stores.items():
                    self._bring_up_to_date(connection, name, steps)
            except BaseException:
                connection.close()
                raise
            self._connection = connection
        return self._connection

    def _bring_up_to_date(self, connection: sqlite3.Connection, name: str, steps: Sequence[Step]) -> None:
        if _version(connection, name) == len(steps):  # nothing is written to a disk that may have no room
            return
        connection.execute("BEGIN IMMEDIATE")
        try:
            version = _version(connection, name)  # another process may have been faster
            if version > len(steps):
                raise StorageUnavailable(
                    f"the store has {name} of version {version}, and this program knows {len(steps)}; "
                    "use the newer program that wrote it"
                )
            for step in steps[version:]:
                for statement in step:
                    connection.execute(statement)
            connection.execute("INSERT OR REPLACE INTO schema_versions VALUES (?, ?)", (name, len(steps)))
            connection.execute("COMMIT")
        finally:
            if connection.in_transaction:
                connection.execute("ROLLBACK")


def _version(connection: sqlite3.Connection, name: str) -> int:
    row = connection.execute("SELECT version FROM schema_versions WHERE store = ?", (name,)).fetchone()
    return row[0] if row else 0


def connect(path: Path) -> sqlite3.Connection:
    """A connection whose commits are on the disk when they return. The file is made where there is none, for its user
    alone; SQLite gives its companions the same mode."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
    sync_folder(path.parent)
    connection = sqlite3.connect(path, timeout=BUSY_LIMIT_S, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA trusted_schema = OFF")
        connection.execute(
            "CREATE TABLE IF NOT EXISTS schema_versions (store TEXT PRIMARY KEY, version INTEGER NOT NULL)"
        )
    except BaseException:
        connection.close()
        raise
    return connection


def sync_folder(folder: Path) -> None:
    """See to it that the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
