"""Disks that are full or read-only: a typed error each time, nothing half-done, and all is well once the disk is."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from llama_orch.contract.models import Artifact, ArtifactKind
from llama_orch.errors import StorageUnavailable
from llama_orch.stores.artifacts import ArtifactStore
from tests.stores.conftest import opened

pytestmark = pytest.mark.spec("HP-CTL-5")


def an_artifact(number: int, size: int = 100_000) -> Artifact:
    return Artifact(kind=ArtifactKind.OTHER, content={"number": number, "text": "x" * size})


def files(home: Path) -> int:
    return sum(file.is_file() for file in (home / "artifacts").rglob("*"))


def total(store: ArtifactStore) -> int:
    return len(store.list(kind=None, tag=None, parent=None, limit=200, cursor=None).items)


def fill_up(store: ArtifactStore, size: int) -> list[str]:
    """Store until it is refused; the ids that were answered."""
    stored: list[str] = []

    def store_on() -> None:
        while True:
            stored.append(store.put(an_artifact(len(stored), size)).ref.id)

    with pytest.raises(StorageUnavailable, match="is full; free some space and repeat"):
        store_on()
    return stored


@pytest.mark.parametrize("size", [100_000, 10])
def test_a_disk_that_fills_up(small_disk: Path, fill: Callable[[Path], Path], size: int) -> None:
    with opened(small_disk) as store:
        store.put(an_artifact(-1))
        filler = fill(small_disk) if size == 10 else None  # for small ones the database is what has no room
        stored = fill_up(store, size)
        assert total(store) == len(stored) + 1
        assert files(small_disk) == len(stored) + 1  # nothing is left of what was refused
        for digest in stored:
            assert store.get(digest).id == digest
        if filler is None:
            store.delete(stored[0])
        else:
            filler.unlink()
        assert store.put(an_artifact(1000, size)).is_new
    with opened(small_disk) as store:
        assert store.sweep() == 0
        assert total(store) >= len(stored)


def test_a_service_that_starts_on_a_full_disk_finds_its_store_later(
    small_disk: Path, fill: Callable[[Path], Path]
) -> None:
    filler = fill(small_disk)
    with opened(small_disk) as store:
        for _ in range(2):
            with pytest.raises(StorageUnavailable):
                store.put(an_artifact(1))
        filler.unlink()
        assert store.get(store.put(an_artifact(1)).ref.id).content["number"] == 1


def test_a_disk_that_turns_read_only(small_disk: Path) -> None:
    def remount(how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", str(small_disk)], check=True)

    with opened(small_disk) as store:
        digest = store.put(an_artifact(1)).ref.id
    remount("ro")  # nobody has a file open for writing: with one open the kernel refuses
    try:
        with opened(small_disk) as store:
            with pytest.raises(StorageUnavailable, match="cannot be written to; make the home folder"):
                store.put(an_artifact(2))
            remount("rw")
            assert store.put(an_artifact(2)).is_new
            assert store.get(digest).content["number"] == 1
    finally:
        remount("rw")


def test_a_file_that_may_not_grow_is_a_full_disk(tmp_path: Path) -> None:
    """What can be had without root: a limit on the size of files, in a process of its own."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            with opened(tmp_path) as store:
                kept = store.put(an_artifact(1, 1000)).ref.id
                limits = resource.getrlimit(resource.RLIMIT_FSIZE)
                resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
                for _ in range(2):
                    with pytest.raises(StorageUnavailable, match="is full"):
                        store.put(an_artifact(2))
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
                assert store.get(kept).content["number"] == 1
                assert store.put(an_artifact(2)).is_new
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
