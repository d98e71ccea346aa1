"""The catalog's rows. An entry is one row and changes as a whole, so that no half of one is ever there (HP-CTL-5)."""

from __future__ import annotations

import logging
import sqlite3

import msgspec

from llama_orch.models.catalog import Entry
from llama_orch.stores.database import Database

log = logging.getLogger("llama_orch.catalog")

STEPS = [
    (
        "CREATE TABLE catalog_models ("
        "id TEXT PRIMARY KEY, number INTEGER NOT NULL UNIQUE, state TEXT NOT NULL, entry BLOB NOT NULL) STRICT",
    )
]


class CatalogStore:
    """Plain and blocking. Raises StorageUnavailable where the disk does not do."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.left_out = 0  # of the rows at the last reading
        database.add_store("catalog", STEPS)

    def all(self) -> list[Entry]:
        """In the order in which they were made. A row that cannot be read is left where it is, with a line in the log:
        the others are of use without it."""
        query = "SELECT id, entry FROM catalog_models ORDER BY number"
        rows = self._database.read(lambda connection: connection.execute(query).fetchall())
        entries = [entry for row in rows if (entry := _read(*row)) is not None]
        self.left_out = len(rows) - len(entries)
        return entries

    def put(self, entry: Entry) -> None:
        """Write the entry, in place of the one with its id if there is one. It is on the disk when this returns."""
        row = (entry.id, entry.number, entry.state.value, msgspec.json.encode(entry))
        self._database.write(lambda c: _put(c, row))

    def remove(self, model_id: str) -> None:
        self._database.write(lambda c: c.execute("DELETE FROM catalog_models WHERE id = ?", (model_id,)))


class CatalogRecords:
    """The same off the event loop, as runtime/catalog.py wants it."""

    def __init__(self, database: Database, store: CatalogStore) -> None:
        self._database = database
        self._store = store

    async def load(self) -> list[Entry]:
        return await self._database.run(self._store.all)

    async def put(self, entry: Entry) -> None:
        await self._database.run(self._store.put, entry)

    async def remove(self, model_id: str) -> None:
        await self._database.run(self._store.remove, model_id)


def _put(connection: sqlite3.Connection, row: tuple[str, int, str, bytes]) -> None:
    model_id, number, state, entry = row
    changed = connection.execute(
        "UPDATE catalog_models SET state = ?, entry = ? WHERE id = ?", (state, entry, model_id)
    ).rowcount
    if not changed:
        connection.execute("INSERT INTO catalog_models VALUES (?, ?, ?, ?)", (model_id, number, state, entry))


def _read(model_id: str, row: bytes) -> Entry | None:
    try:
        return msgspec.json.decode(row, type=Entry)
    except msgspec.MsgspecError as error:
        log.error("the catalog's model %s cannot be read and is left out: %s", model_id, error)
        return None
