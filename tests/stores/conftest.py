"""A store in a folder of its own, and one on a disk that is soon full."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import pytest

from llama_orch.stores.artifacts import ArtifactStore
from llama_orch.stores.database import Database

SECRET = 'tok"en-\\of-the-service'


@contextmanager
def opened(home: Path) -> Iterator[ArtifactStore]:
    """The store of a home folder; time is seconds that count up."""
    seconds = count(1_767_268_800)
    database = Database(home / "state.sqlite3")
    try:
        yield ArtifactStore(database, home / "artifacts", lambda: float(next(seconds)), [SECRET])
    finally:
        database.close()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ArtifactStore]:
    with opened(tmp_path) as store:
        yield store


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MiB. It is a tmpfs, for which one has to be root; who is not has test_limits.py's stand-in alone."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m,mode=700", "llorch-test", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def fill() -> Callable[[Path], Path]:
    """Write until a disk is full; what is returned is to be removed."""

    def fill(folder: Path) -> Path:
        filler = folder / "filler"
        descriptor = os.open(filler, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            for size in (1 << 20, 4096, 512, 1):
                while True:
                    try:
                        os.write(descriptor, b"x" * size)
                    except OSError:
                        break
        finally:
            os.close(descriptor)
        return filler

    return fill
