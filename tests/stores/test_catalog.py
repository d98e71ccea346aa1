"""The catalog's rows."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec import structs

from llama_orch.contract.models import CatalogModelRequest, GgufInfo, ModelManifest, ModelState
from llama_orch.errors import StorageUnavailable
from llama_orch.models.catalog import Entry, Finding, Sight
from llama_orch.stores.catalog import CatalogStore
from llama_orch.stores.database import Database

DIGEST = "sha256:" + "a" * 64


def entry(model_id: str, number: int) -> Entry:
    """With something in every field."""
    return Entry(
        number=number,
        declared=CatalogModelRequest(
            id=model_id, source_url="file:/m.gguf", digest=DIGEST, manifests=[ModelManifest(digest=DIGEST)]
        ),
        created_s=1.5,
        sight=Sight(
            size_bytes=7,
            gguf=GgufInfo(architecture="llama", context_length=None, quantisation="F32", vram_bytes=None),
        ),
        finding=Finding(at_s=2.5, key="k", digest=DIGEST, size_bytes=7),
        is_due=True,
    )


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(tmp_path / "state.sqlite3")
    yield database
    database.close()


@pytest.fixture
def store(database: Database) -> CatalogStore:
    return CatalogStore(database)


def read_anew(database: Database) -> list[Entry]:
    """As the next service reads it."""
    other = Database(database.path)
    try:
        return CatalogStore(other).all()
    finally:
        other.close()


@pytest.mark.spec("HP-CTL-5")
def test_what_was_put_is_there_for_the_next_service(database: Database, store: CatalogStore) -> None:
    """With every field, in the order in which it was made."""
    late, early = entry("a", 2), entry("b", 1)
    store.put(late)
    store.put(early)
    assert read_anew(database) == [early, late]


def test_a_changed_entry_takes_the_place_of_the_old_one(database: Database, store: CatalogStore) -> None:
    store.put(entry("a", 1))
    retired = structs.replace(entry("a", 1), state=ModelState.RETIRED, finding=None)
    store.put(retired)
    assert read_anew(database) == [retired]


def test_a_removed_entry_is_gone_and_removing_it_again_does_no_harm(database: Database, store: CatalogStore) -> None:
    store.put(entry("a", 1))
    store.put(entry("b", 2))
    store.remove("a")
    store.remove("a")
    assert [one.id for one in read_anew(database)] == ["b"]


def test_a_row_that_cannot_be_read_costs_the_others_nothing(
    database: Database, store: CatalogStore, caplog: pytest.LogCaptureFixture
) -> None:
    """It stays where it is, and the log names it."""
    store.put(entry("a", 1))
    store.put(entry("b", 2))
    database.write(lambda c: c.execute("UPDATE catalog_models SET entry = x'7b' WHERE id = 'a'"))
    assert [one.id for one in store.all()] == ["b"]
    assert "model a cannot be read" in caplog.text
    assert database.read(lambda c: c.execute("SELECT count(*) FROM catalog_models").fetchone()) == (2,)


def test_a_disk_that_does_not_do_is_told(tmp_path: Path) -> None:
    """The file is no database."""
    path = tmp_path / "state.sqlite3"
    path.write_bytes(b"no database" * 1000)
    database = Database(path)
    store = CatalogStore(database)
    try:
        with pytest.raises(StorageUnavailable, match="damaged"):
            store.all()
        with pytest.raises(StorageUnavailable, match="damaged"):
            store.put(entry("a", 1))
    finally:
        database.close()


def test_two_entries_never_share_a_number(store: CatalogStore) -> None:
    """Cursors count by it."""
    store.put(entry("a", 1))
    with pytest.raises(sqlite3.IntegrityError):
        store.put(entry("b", 1))
