"""SHA-256 of model files, remembered by path, size, time and inode, so that a large file is read once.

The memory is a cache and nothing more: losing it costs a read.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

ENTRIES_MAX = 1000
CHUNK_BYTES = 1 << 22


class Digests:
    """`file` holds the memory; it is replaced as a whole, so a reader never sees half of it."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._turn = threading.Lock()
        self._pen = threading.Lock()
        self._stopped = threading.Event()

    def of(self, path: Path) -> str:
        """`sha256:` and the digest. Blocks for as long as reading the file takes: call it in a thread."""
        key = file_key(path)
        with self._turn:  # replicas of one model ask at the same time; the file is read for the first of them
            known = self._read()
            if key not in known:
                known[key] = f"sha256:{self._hash(path)}"
                self.remember(key, known[key])
            return known[key]

    def remember(self, key: str, digest: str) -> None:
        """What somebody has computed of the file that `file_key` gives this key."""
        with self._pen, suppress(OSError):  # a full disk costs the next start a read, not this one its model
            known = self._read() | {key: digest}
            self._write(dict(list(known.items())[-ENTRIES_MAX:]))

    def known(self, path: Path) -> str | None:
        """The digest where it is remembered; the file is not read."""
        try:
            return self._read().get(file_key(path))
        except OSError:
            return None

    def stop(self) -> None:
        """Give up whatever is being read: the service ends."""
        self._stopped.set()

    def _hash(self, path: Path) -> str:
        digest = hashlib.sha256()
        with path.open("rb") as content:
            while chunk := content.read(CHUNK_BYTES):
                digest.update(chunk)
                if self._stopped.is_set():
                    raise InterruptedError(f"{path.name} was not read to its end")
        return digest.hexdigest()

    def _read(self) -> dict[str, str]:
        try:
            known = json.loads(self._file.read_text())
        except (OSError, ValueError):
            return {}  # absent or damaged: it is only a cache
        return known if isinstance(known, dict) else {}

    def _write(self, known: dict[str, str]) -> None:
        handle, name = tempfile.mkstemp(dir=self._file.parent, prefix=".digests-")
        try:
            with os.fdopen(handle, "w") as file:
                json.dump(known, file)
            Path(name).replace(self._file)
        finally:
            Path(name).unlink(missing_ok=True)


def file_key(path: Path, about: os.stat_result | None = None) -> str:
    """What changes when the file does."""
    stat = path.stat() if about is None else about
    return f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ino}"
