"""A copy of the stores, and back."""

from __future__ import annotations

import os
import sqlite3
import stat
import threading
from pathlib import Path

import pytest

from llama_orch.contract.models import Artifact, ArtifactKind
from llama_orch.stores.artifacts import ArtifactStore
from llama_orch.stores.backup import BackupError, back_up, restore
from tests.stores.conftest import opened

pytestmark = pytest.mark.spec("HP-CTL-5")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def fill(store: ArtifactStore, first: int, count: int) -> list[str]:
    return [
        store.put(Artifact(kind=ArtifactKind.OTHER, content={"n": n, "t": "x" * 2000}, tags=["t"])).ref.id
        for n in range(first, first + count)
    ]


def listed(store: ArtifactStore) -> list[str]:
    return [ref.id for ref in store.list(kind=None, tag="t", parent=None, limit=200, cursor=None).items]


def test_a_round_trip_brings_back_what_was_there_and_only_that(home: Path, tmp_path: Path) -> None:
    with opened(home) as store:
        kept = fill(store, 0, 5)
        before = [store.get(digest) for digest in kept]
    (home / "token").write_text("secret")
    assert back_up(home, tmp_path / "copy").artifacts == 5
    with opened(home) as store:
        store.delete(kept[0])
        fill(store, 100, 3)
    assert restore(tmp_path / "copy", home).artifacts == 5
    with opened(home) as store:
        assert listed(store) == kept[::-1]
        assert [store.get(digest) for digest in kept] == before
        assert store.sweep() == 0  # what came after the copy is gone from the disk as well
        (newer,) = fill(store, 200, 1)
        assert listed(store)[0] == newer
    assert (home / "token").read_text() == "secret"


def test_a_copy_is_for_its_user_alone_and_has_no_secret(home: Path, tmp_path: Path) -> None:
    (home / "token").write_text("secret-of-the-service")
    with opened(home) as store:
        fill(store, 0, 1)
    old = os.umask(0)
    try:
        back_up(home, tmp_path / "copy")
    finally:
        os.umask(old)
    entries = [tmp_path / "copy", *(tmp_path / "copy").rglob("*")]
    assert {stat.S_IMODE(entry.stat().st_mode) for entry in entries if entry.is_dir()} == {0o700}
    files = [entry for entry in entries if entry.is_file()]
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    assert not any(b"secret-of-the-service" in file.read_bytes() for file in files)
    assert sorted(file.name for file in files if len(file.name) < 60) == ["backup.json", "state.sqlite3"]


def test_a_copy_while_others_write_and_delete_is_whole(home: Path, tmp_path: Path) -> None:
    is_over = threading.Event()

    def write() -> None:
        with opened(home) as store:
            number = 1000
            while not is_over.is_set():
                (digest,) = fill(store, number, 1)
                if number % 3:
                    store.delete(digest)
                number += 1

    with opened(home) as store:
        kept = fill(store, 0, 30)
    writer = threading.Thread(target=write)
    writer.start()
    try:
        copies = [back_up(home, tmp_path / f"copy{n}") for n in range(5)]
    finally:
        is_over.set()
        writer.join()
    for n, copied in enumerate(copies):
        (tmp_path / f"home{n}").mkdir()
        assert copied.damaged == []
        assert restore(tmp_path / f"copy{n}", tmp_path / f"home{n}").artifacts == copied.artifacts >= 30
        with opened(tmp_path / f"home{n}") as store:
            found = listed(store)
            assert set(kept) <= set(found)
            assert all(store.get(digest).id == digest for digest in found)


def test_a_damaged_artifact_is_named_and_the_rest_is_copied(home: Path, tmp_path: Path) -> None:
    with opened(home) as store:
        good, bad = fill(store, 0, 2)
    (home / "artifacts" / bad[:2] / bad).write_bytes(b"{}")
    assert back_up(home, tmp_path / "copy") == (1, [bad])
    (tmp_path / "other").mkdir()
    restore(tmp_path / "copy", tmp_path / "other")
    with opened(tmp_path / "other") as store:
        assert listed(store) == [good]


def test_a_damaged_database_is_put_aside_by_a_restore(home: Path, tmp_path: Path) -> None:
    with opened(home) as store:
        kept = fill(store, 0, 2)
    back_up(home, tmp_path / "copy")
    (home / "state.sqlite3").write_bytes(b"no database " * 1000)
    restore(tmp_path / "copy", home)
    with opened(home) as store:
        assert listed(store) == kept[::-1]
    (aside,) = home.glob("state.sqlite3.damaged-*")
    assert aside.read_bytes().startswith(b"no database")


def test_a_copy_that_is_not_whole_changes_nothing(home: Path, tmp_path: Path) -> None:
    with opened(home) as store:
        kept = fill(store, 0, 2)
    copy = tmp_path / "copy"
    back_up(home, copy)
    blob = copy / "artifacts" / kept[0][:2] / kept[0]
    content = blob.read_bytes()
    blob.write_bytes(b"{}")
    with opened(home) as store:
        newer = fill(store, 10, 1)
    with pytest.raises(BackupError, match="lacks the content of artifact"):
        restore(copy, home)
    blob.write_bytes(content)
    manifest = (copy / "backup.json").read_bytes()
    for text, why in ((b"{", "cannot be read"), (b"[]", "cannot be read"), (b'{"format": 2}', "of format 2")):
        (copy / "backup.json").write_bytes(text)
        with pytest.raises(BackupError, match=why):
            restore(copy, home)
    (copy / "backup.json").unlink()
    with pytest.raises(BackupError, match="no whole backup"):
        restore(copy, home)
    (copy / "backup.json").write_bytes(manifest)
    (copy / "state.sqlite3").write_bytes(b"x" * 5000)
    with pytest.raises(BackupError, match="damaged"):
        restore(copy, home)
    with opened(home) as store:
        assert listed(store) == [*newer, *kept[::-1]]


def test_a_backup_overwrites_nothing(home: Path, tmp_path: Path) -> None:
    with pytest.raises(BackupError, match="nothing to back up"):
        back_up(home, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    with opened(home) as store:
        fill(store, 0, 1)
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "mine").touch()
    with pytest.raises(BackupError, match="is not empty"):
        back_up(home, tmp_path / "copy")
    with pytest.raises(BackupError, match="File exists"):
        back_up(home, tmp_path / "copy" / "mine")


def test_a_full_disk_leaves_no_backup_that_looks_whole(home: Path, small_disk: Path) -> None:
    with opened(home) as store:
        for n in range(6):
            store.put(Artifact(kind=ArtifactKind.OTHER, content={"n": n, "t": "x" * 1_000_000}))
    with pytest.raises(BackupError, match="is full; free some space"):
        back_up(home, small_disk / "copy")
    with pytest.raises(BackupError, match="no whole backup"):
        restore(small_disk / "copy", home)


def test_a_copy_has_the_tables_of_all_stores(home: Path, tmp_path: Path) -> None:
    with opened(home) as store:
        store.database.add_store("others", [("CREATE TABLE others (name TEXT)", "INSERT INTO others VALUES ('a')")])
        fill(store, 0, 1)
    back_up(home, tmp_path / "copy")
    restore(tmp_path / "copy", home)
    with sqlite3.connect(home / "state.sqlite3") as connection:
        assert connection.execute("SELECT name FROM others").fetchall() == [("a",)]
    connection.close()
