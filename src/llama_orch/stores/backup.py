"""The stores of a home folder, copied to a folder and back.

A copy is made while the service runs: first the database, as SQLite copies one state of it, then the blobs that this
state refers to. `backup.json` is written last, so a copy without it is not whole. A restore checks the whole copy
before it changes anything, and changes the database in one transaction. Token, caches and models are no part of a copy.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

from llama_orch import __version__
from llama_orch.clock import timestamp
from llama_orch.errors import StorageUnavailable
from llama_orch.stores import artifacts, database
from llama_orch.stores.artifacts import ArtifactStore
from llama_orch.stores.blobs import Blobs
from llama_orch.stores.database import Database, connect, sync_folder
from llama_orch.stores.failures import translated

MANIFEST_NAME = "backup.json"
FORMAT = 1


class BackupError(Exception):
    """It cannot be done, and nothing that was there has changed. The text is for the user."""


class Copied(NamedTuple):
    """`damaged`: ids of artifacts whose content was lost before the copy was made, so that it has none of them."""

    artifacts: int
    damaged: list[str]


def back_up(home: Path, folder: Path) -> Copied:
    """Copy the stores of `home` into a folder that is new or empty."""
    source = home / database.FILE_NAME
    if not source.is_file():
        raise BackupError(f"{home} has nothing to back up: no service has kept anything there yet")
    with _reported("the backup"):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise BackupError(f"{folder} is not empty; name a new folder")
        _copy_database(source, folder / database.FILE_NAME)
        with _store(folder) as store:
            copied = _copy_blobs(store, source, home)
        manifest = {"format": FORMAT, "program": __version__, "created": timestamp(time.time())}
        _write(folder / MANIFEST_NAME, json.dumps(manifest | {"artifacts": copied.artifacts}) + "\n")
    return copied


def restore(folder: Path, home: Path) -> Copied:
    """Put the copy in `folder` in the place of what the stores of `home` have. The caller holds the home's lock."""
    _check_manifest(folder)
    with _reported("the restore"), _opened(folder / database.FILE_NAME) as source:
        content = Blobs(folder / artifacts.FOLDER_NAME)
        ids = _ids(source)
        _check(source, content, ids)
        own = Blobs(home / artifacts.FOLDER_NAME)
        _copy_all(content, own, ids)
        with closing(_usable(home / database.FILE_NAME)) as target:
            source.backup(target)
        # A command's own server may have swept some that nothing referred to yet.
        _copy_all(content, own, ids)
        with _store(home) as store:
            store.sweep()
    return Copied(len(ids), [])


# -- the database ----------------------------------------------------------------------------------------------------


def _copy_database(source: Path, target: Path) -> None:
    with _opened(source) as connection, closing(connect(target)) as copy:
        connection.backup(copy)
        (verdict,) = copy.execute("PRAGMA integrity_check").fetchone()
    if verdict != "ok":
        raise BackupError(f"{source} is damaged: {verdict}; restore an earlier backup")


@contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    """A file that is there."""
    uri = f"{path.absolute().as_uri()}?mode=rw"
    with closing(sqlite3.connect(uri, uri=True, timeout=database.BUSY_LIMIT_S, isolation_level=None)) as connection:
        yield connection


def _usable(path: Path) -> sqlite3.Connection:
    """The database to restore into. One that is damaged is put aside, with what belongs to it."""
    try:
        return connect(path)
    except sqlite3.DatabaseError as error:
        if error.sqlite_errorcode & 0xFF not in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
            raise
    for suffix in ("-wal", "-shm", ""):
        companion = path.with_name(path.name + suffix)
        if companion.exists():
            companion.rename(path.with_name(f"{path.name}.damaged-{int(time.time())}{suffix}"))
    return connect(path)


def _ids(connection: sqlite3.Connection) -> list[str]:
    """Of the artifacts; none where there never were any."""
    has_table = connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'artifacts'").fetchone()
    return [row[0] for row in connection.execute("SELECT id FROM artifacts")] if has_table else []


# -- the blobs -------------------------------------------------------------------------------------------------------


def _copy_blobs(store: ArtifactStore, source: Path, home: Path) -> Copied:
    """What the copied database refers to. What was deleted meanwhile, or is damaged, the copy forgets."""
    content, own = Blobs(home / artifacts.FOLDER_NAME), Blobs(store.folder)
    ids, damaged, deleted = store.database.read(_ids), list[str](), 0
    with _opened(source) as live:
        for digest in ids:
            try:
                blob = content.get(digest)
            except StorageUnavailable:
                store.delete(digest)
                if live.execute("SELECT 1 FROM artifacts WHERE id = ?", (digest,)).fetchone():
                    damaged.append(digest)
                else:
                    deleted += 1
            else:
                own.put(blob)
    return Copied(len(ids) - len(damaged) - deleted, damaged)


def _copy_all(source: Blobs, target: Blobs, ids: list[str]) -> None:
    for digest in ids:
        target.put(source.get(digest))


@contextmanager
def _store(home: Path) -> Iterator[ArtifactStore]:
    with closing(Database(home / database.FILE_NAME)) as opened:
        yield ArtifactStore(opened, home / artifacts.FOLDER_NAME, time.time)


# -- a copy and whether it is whole ----------------------------------------------------------------------------------


def _check_manifest(folder: Path) -> None:
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_bytes())
        version = manifest["format"]
    except FileNotFoundError:
        raise BackupError(f"{folder} is no whole backup: it has no {MANIFEST_NAME}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BackupError(f"{folder / MANIFEST_NAME} cannot be read: {error}") from error
    if version != FORMAT:
        raise BackupError(f"{folder} is a backup of format {version}, and this program knows {FORMAT}")


def _check(source: sqlite3.Connection, content: Blobs, ids: list[str]) -> None:
    (verdict,) = source.execute("PRAGMA integrity_check").fetchone()
    if verdict != "ok":
        raise BackupError(f"the backup's database is damaged: {verdict}")
    for digest in ids:
        try:
            content.get(digest)
        except StorageUnavailable as error:
            raise BackupError(f"the backup lacks the content of artifact {digest}, or has it damaged") from error


def _write(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(descriptor)
    sync_folder(path.parent)


@contextmanager
def _reported(what: str) -> Iterator[None]:
    """Whatever the disk does wrong, for the user, who may know the paths."""
    try:
        with translated(what):
            yield
    except StorageUnavailable as error:
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        raise BackupError(f"{error.message}{cause}") from error
