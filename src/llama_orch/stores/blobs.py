"""Files named by the SHA-256 of their content.

Invariants: a file that has its name is whole; a file that `put` has returned for is on the disk, name and all. What an
interrupted write leaves has a name that no blob has, and is swept. Who makes or removes a blob holds the write lock of
the database that refers to it, so that no blob goes between somebody's finding it and referring to it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import secrets
from collections.abc import Container, Iterator
from contextlib import suppress
from pathlib import Path

from llama_orch.errors import StorageUnavailable
from llama_orch.stores.database import sync_folder
from llama_orch.stores.failures import translated

log = logging.getLogger("llama_orch.stores")
_is_digest = re.compile(r"[0-9a-f]{64}").fullmatch


class Blobs:
    """A folder of them, for its user alone. Digests are 64 hexadecimal digits."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, digest: str) -> Path:
        if not _is_digest(digest):  # it becomes part of a path
            raise ValueError("no digest")
        return self._folder / digest[:2] / digest

    def put(self, content: bytes) -> str:
        """The content's digest, once it is on the disk. A file that is there and is damaged is replaced."""
        digest = hashlib.sha256(content).hexdigest()
        with translated("the folder of blobs"):
            if self._read(digest) != content:
                self._write(self.path(digest), content)
        return digest

    def get(self, digest: str) -> bytes:
        """The content, checked. StorageUnavailable where it is lost or damaged."""
        with translated("the folder of blobs"):
            content = self._read(digest)
        if content is None or hashlib.sha256(content).hexdigest() != digest:
            log.error("blob %s is %s", digest, "lost" if content is None else "damaged")
            raise StorageUnavailable(
                f"the content with the digest sha256:{digest} is lost or damaged on the disk; "
                "store it again, or restore a backup"
            )
        return content

    def remove(self, digest: str) -> None:
        """Nothing where there is none."""
        with translated("the folder of blobs"), suppress(FileNotFoundError):
            self.path(digest).unlink()

    def sweep(self, referred: Container[str]) -> int:
        """Remove what an interrupted write left, and blobs that nothing refers to; returns their number."""
        removed = 0
        with translated("the folder of blobs"):
            for file in list(self._files()):
                if not (_is_digest(file.name) and file.name[:2] == file.parent.name and file.name in referred):
                    file.unlink(missing_ok=True)
                    removed += 1
        return removed

    def _files(self) -> Iterator[Path]:
        if self._folder.is_dir():
            for folder in self._folder.iterdir():
                if folder.is_dir() and not folder.is_symlink():
                    yield from (file for file in folder.iterdir() if file.is_symlink() or not file.is_dir())

    def _read(self, digest: str) -> bytes | None:
        try:
            descriptor = os.open(self.path(digest), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        with open(descriptor, "rb") as file:
            return file.read()

    def _write(self, path: Path, content: bytes) -> None:
        for folder in (self._folder, path.parent):
            if not folder.is_dir():
                folder.mkdir(mode=0o700, exist_ok=True)
                sync_folder(folder.parent)
        draft = path.with_name(f".{secrets.token_hex(8)}")
        try:
            descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with open(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(descriptor)
            draft.rename(path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
