"""Artifacts: their content as blobs, everything else about them in the database (HP-ART-1).

Invariants: an artifact that was answered for is on the disk, and one that is listed can be read (HP-CTL-5): its blob is
there before its row, and goes after it. The id is the digest of the content, so what was stored first stands, and
nothing about it changes later.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import msgspec
from msgspec import UNSET

from llama_orch.contract.models import Artifact, ArtifactKind, ArtifactList, ArtifactRef, StoredArtifact
from llama_orch.errors import InvalidParams, NotFound, PayloadTooLarge, StorageUnavailable
from llama_orch.stores.blobs import Blobs
from llama_orch.stores.canonical import canonical_json
from llama_orch.stores.database import Database

CONTENT_BYTES_MAX = 4 << 20
METADATA_BYTES_MAX = 64 << 10
FOLDER_NAME = "artifacts"
NAME = "artifacts"
STEPS = [
    (
        """CREATE TABLE artifacts (
            number INTEGER PRIMARY KEY AUTOINCREMENT,  -- counts what was stored; never used twice
            id TEXT NOT NULL UNIQUE,
            kind TEXT NOT NULL,
            created_ms INTEGER NOT NULL,
            size_bytes INTEGER NOT NULL,
            parent TEXT,  -- may have been deleted since
            tags TEXT NOT NULL,
            metadata TEXT NOT NULL
        ) STRICT""",
        "CREATE INDEX artifacts_by_kind ON artifacts (kind, number)",
        "CREATE INDEX artifacts_by_parent ON artifacts (parent, number)",
        """CREATE TABLE artifact_tags (
            tag TEXT NOT NULL,
            number INTEGER NOT NULL REFERENCES artifacts (number),
            PRIMARY KEY (tag, number)
        ) STRICT, WITHOUT ROWID""",
        "CREATE INDEX artifact_tags_by_number ON artifact_tags (number)",
    ),
]
_COLUMNS = "number, id, kind, created_ms, size_bytes, parent, tags, metadata"


class Put(NamedTuple):
    """What became of an artifact that was to be stored; `is_new` False: its content was there."""

    ref: ArtifactRef
    is_new: bool


class ArtifactStore:
    """Blocks: call it through `database.run`. `wall` gives seconds since the epoch. `secrets` are texts that no
    artifact may hold (HP-SEC-7)."""

    def __init__(
        self, database: Database, folder: Path, wall: Callable[[], float], secrets: Collection[str] = ()
    ) -> None:
        self.database = database
        self.folder = folder
        self._blobs = Blobs(folder)
        self._wall = wall
        self._secrets = [json.dumps(secret, ensure_ascii=False)[1:-1].encode() for secret in secrets if secret]
        database.add_store(NAME, STEPS)

    def put(self, artifact: Artifact) -> Put:
        """Store the artifact. NotFound for a parent that is not there, PayloadTooLarge, InvalidParams."""
        content = self._checked("content", canonical_json(artifact.content), CONTENT_BYTES_MAX)
        metadata = {} if artifact.metadata is UNSET else artifact.metadata
        described = self._checked("metadata", canonical_json(metadata), METADATA_BYTES_MAX)
        tags = sorted(set(() if artifact.tags is UNSET else artifact.tags))
        self._checked("tags", canonical_json(tags), METADATA_BYTES_MAX)
        digest = hashlib.sha256(content).hexdigest()

        def write(connection: sqlite3.Connection) -> Put:
            if artifact.parent is not None:
                _row(connection, artifact.parent, "the artifact that was to be the parent is not there")
            if (row := _find(connection, digest)) is not None:
                self._blobs.put(content)  # one that was damaged is whole again
                return Put(_ref(row), is_new=False)
            self._blobs.put(content)
            values = (digest, artifact.kind.value, round(self._wall() * 1000), len(content), artifact.parent)
            number = connection.execute(
                "INSERT INTO artifacts (id, kind, created_ms, size_bytes, parent, tags, metadata)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                (*values, canonical_json(tags).decode(), described.decode()),
            ).lastrowid
            connection.executemany("INSERT INTO artifact_tags VALUES (?, ?)", [(tag, number) for tag in tags])
            return Put(_ref(_row(connection, digest)), is_new=True)

        try:
            return self.database.write(write)
        except BaseException:
            with suppress(StorageUnavailable):  # then the next start sweeps it
                self.database.write(lambda connection: self._remove_unless_referred(connection, digest))
            raise

    def _remove_unless_referred(self, connection: sqlite3.Connection, digest: str) -> None:
        if _find(connection, digest) is None:
            self._blobs.remove(digest)

    def get(self, artifact_id: str) -> StoredArtifact:
        """The artifact with its content. NotFound; StorageUnavailable where the content is damaged."""
        row = self.database.read(lambda connection: _row(connection, artifact_id))
        try:
            content = self._blobs.get(row["id"])
        except StorageUnavailable:
            self.database.read(lambda connection: _row(connection, artifact_id))  # another process may have deleted it
            raise
        return StoredArtifact(
            **msgspec.structs.asdict(_ref(row)),
            content=msgspec.json.decode(content),
            metadata=msgspec.json.decode(row["metadata"]),
        )

    def list(
        self, *, kind: ArtifactKind | None, tag: str | None, parent: str | None, limit: int, cursor: str | None
    ) -> ArtifactList:
        """One page, newest first."""
        source, conditions, values = "artifacts", ["TRUE"], list[object]()
        if tag is not None:
            source = "artifacts JOIN artifact_tags USING (number)"
        for condition, value in (("kind", kind), ("tag", tag), ("parent", parent)):
            if value is not None:
                conditions.append(f"{condition} = ?")
                values.append(str(value))
        if cursor is not None:
            conditions.append("number < ?")
            values.append(_number(cursor))
        query = f"SELECT {_COLUMNS} FROM {source} WHERE {' AND '.join(conditions)} ORDER BY number DESC LIMIT ?"
        rows = self.database.read(lambda connection: _rows(connection, query, (*values, limit + 1)))
        page = rows[:limit]
        more = str(page[-1]["number"]) if len(rows) > limit else None
        return ArtifactList(items=[_ref(row) for row in page], next_cursor=more)

    def delete(self, artifact_id: str) -> None:
        """Delete the artifact, its content too. Those that come from it go on naming it. NotFound."""

        def forget(connection: sqlite3.Connection) -> str:
            row = _row(connection, artifact_id)
            connection.execute("DELETE FROM artifact_tags WHERE number = ?", (row["number"],))
            connection.execute("DELETE FROM artifacts WHERE number = ?", (row["number"],))
            return str(row["id"])

        digest = self.database.write(forget)
        # Once the row is gone for good, and unless it was stored anew meanwhile.
        self.database.write(lambda connection: self._remove_unless_referred(connection, digest))

    def sweep(self) -> int:
        """Remove what interrupted writes and deletions left on the disk; returns the number of files."""

        def work(connection: sqlite3.Connection) -> int:
            referred = {row["id"] for row in _rows(connection, "SELECT id FROM artifacts", ())}
            return self._blobs.sweep(referred)

        return self.database.write(work)

    def _checked(self, what: str, data: bytes, limit: int) -> bytes:
        if len(data) > limit:
            raise PayloadTooLarge(
                f"`{what}` has {len(data)} bytes as canonical JSON, and an artifact may have {limit}; send less, "
                "or several artifacts with one parent",
                details={"size_bytes": len(data), "size_bytes_max": limit},
            )
        if any(secret in data for secret in self._secrets):
            raise InvalidParams(f"`{what}` holds the token of this service, which no artifact may keep; take it out")
        return data


def _rows(connection: sqlite3.Connection, query: str, values: tuple[object, ...]) -> list[sqlite3.Row]:
    cursor = connection.cursor()
    cursor.row_factory = sqlite3.Row
    return cursor.execute(query, values).fetchall()


def _find(connection: sqlite3.Connection, artifact_id: str) -> sqlite3.Row | None:
    found = _rows(connection, f"SELECT {_COLUMNS} FROM artifacts WHERE id = ?", (artifact_id,))
    return found[0] if found else None


def _row(connection: sqlite3.Connection, artifact_id: str, otherwise: str = "there is no such artifact") -> sqlite3.Row:
    row = _find(connection, artifact_id)
    if row is None:  # what was asked for is not repeated: it may be anything, a token included
        raise NotFound(f"{otherwise}; it may have been deleted")
    return row


def _ref(row: sqlite3.Row) -> ArtifactRef:
    return ArtifactRef(
        id=row["id"],
        kind=ArtifactKind(row["kind"]),
        digest=f"sha256:{row['id']}",
        created_ms=row["created_ms"],
        tags=msgspec.json.decode(row["tags"], type=list[str]),
        parent=row["parent"],
        size_bytes=row["size_bytes"],
    )


def _number(cursor: str) -> int:
    if not (cursor.isascii() and cursor.isdigit() and len(cursor) <= 18):
        raise InvalidParams("`cursor` is not one that this service gave out; start again without it")
    return int(cursor)
