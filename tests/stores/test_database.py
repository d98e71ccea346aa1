"""The file that all stores share."""

from __future__ import annotations

import asyncio
import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from llama_orch.errors import StorageUnavailable
from llama_orch.stores.database import Database

FIRST = ("CREATE TABLE things (name TEXT PRIMARY KEY)",)
SECOND = ("ALTER TABLE things ADD COLUMN size INTEGER NOT NULL DEFAULT 0", "INSERT INTO things VALUES ('old', 7)")


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(tmp_path / "state.sqlite3")
    database.add_store("things", [FIRST])
    yield database
    database.close()


def names(database: Database) -> list[str]:
    return [row[0] for row in database.read(lambda c: c.execute("SELECT name FROM things ORDER BY name").fetchall())]


def add(name: str, connection: sqlite3.Connection) -> None:
    connection.execute("INSERT INTO things (name) VALUES (?)", (name,))


def test_what_was_written_is_there_for_the_next_one_who_opens_it(database: Database) -> None:
    database.write(lambda connection: add("a", connection))
    other = Database(database.path)
    other.add_store("things", [FIRST])
    try:
        assert names(other) == ["a"]
    finally:
        other.close()


def test_a_write_that_raises_leaves_nothing(database: Database) -> None:
    def half(connection: sqlite3.Connection) -> None:
        add("half", connection)
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        database.write(half)
    assert names(database) == []


def test_a_store_is_brought_up_to_date_once_and_stores_do_not_collide(database: Database) -> None:
    database.write(lambda connection: add("a", connection))
    database.close()
    for _ in range(2):
        later = Database(database.path)
        later.add_store("things", [FIRST, SECOND])
        later.add_store("others", [("CREATE TABLE others (name TEXT)",)])
        try:
            assert names(later) == ["a", "old"]
        finally:
            later.close()


def test_a_step_that_fails_leaves_the_version_before(database: Database) -> None:
    names(database)
    database.add_store("others", [])
    with pytest.raises(sqlite3.OperationalError, match="no such table"):
        database.add_store("things", [FIRST, ("CREATE TABLE more (name TEXT)", "INSERT INTO absent VALUES (1)")])
    tables = database.read(lambda c: c.execute("SELECT name FROM sqlite_master WHERE name = 'more'").fetchall())
    assert tables == []


def test_a_file_of_a_later_version_is_left_alone(database: Database) -> None:
    names(database)
    older = Database(database.path)
    older.add_store("things", [])
    with pytest.raises(StorageUnavailable, match="use the newer program"):
        older.read(lambda connection: connection.execute("SELECT 1").fetchall())
    older.close()


def test_the_file_and_its_companions_are_for_their_user_alone(database: Database) -> None:
    database.write(lambda connection: add("a", connection))
    files = sorted(database.path.parent.iterdir())
    assert [file.name for file in files] == ["state.sqlite3", "state.sqlite3-shm", "state.sqlite3-wal"]
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


def test_commits_are_on_the_disk_when_they_return(database: Database) -> None:
    settings = database.read(
        lambda c: [c.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")]
    )
    assert settings == ["wal", 2]  # 2: FULL


def test_a_damaged_file_is_a_typed_error_without_its_path(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite3"
    path.write_bytes(b"something else entirely " * 200)
    database = Database(path)
    with pytest.raises(StorageUnavailable, match="is damaged; stop the service and restore") as caught:
        database.read(lambda connection: connection.execute("SELECT 1").fetchall())
    assert str(tmp_path) not in caught.value.message
    database.close()


def test_a_store_that_could_not_be_opened_is_opened_when_it_can_be(tmp_path: Path) -> None:
    database = Database(tmp_path / "later" / "state.sqlite3")
    database.add_store("things", [FIRST])
    with pytest.raises(StorageUnavailable):
        names(database)
    (tmp_path / "later").mkdir()
    assert names(database) == []
    database.close()


def test_another_process_that_writes_too_long_is_a_typed_error(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llama_orch.stores.database.BUSY_LIMIT_S", 0.01)
    names(database)
    other = sqlite3.connect(database.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StorageUnavailable, match="in use by another process"):
        database.write(lambda connection: add("a", connection))
    other.execute("ROLLBACK")
    other.close()
    database.write(lambda connection: add("a", connection))
    assert names(database) == ["a"]


def test_close_sees_to_the_end_what_was_submitted(database: Database) -> None:
    for number in range(20):
        database.submit(database.write, lambda connection, number=number: add(f"{number:02}", connection))
    database.close()
    assert len(names(database)) == 20


def test_the_event_loop_does_not_wait_for_the_disk(database: Database) -> None:
    async def both() -> list[str]:
        await asyncio.gather(
            *(database.run(database.write, lambda c, number=number: add(str(number), c)) for number in range(3))
        )
        return await database.run(names, database)

    assert asyncio.run(both()) == ["0", "1", "2"]
