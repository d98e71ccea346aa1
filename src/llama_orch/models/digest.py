"""SHA-256 of model files, remembered by path, size, time and inode, so that a large file is read once.

The memory is a cache and nothing more: losing it costs a read.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path

ENTRIES_MAX = 1000


class Digests:
    """`file` holds the memory; it is replaced as a whole, so a reader never sees half of it."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def of(self, path: Path) -> str:
        """`sha256:` and the digest. Blocks for as long as reading the file takes: call it in a thread."""
        stat = path.stat()
        key = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ino}"
        known = self._read()
        if key not in known:
            with path.open("rb") as content:
                known[key] = "sha256:" + hashlib.file_digest(content, "sha256").hexdigest()
            self._write(dict(list(known.items())[-ENTRIES_MAX:]))
        return known[key]

    def _read(self) -> dict[str, str]:
        try:
            known = json.loads(self._file.read_text())
        except (OSError, ValueError):
            return {}  # absent or damaged: it is only a cache
        return known if isinstance(known, dict) else {}

    def _write(self, known: dict[str, str]) -> None:
        handle, name = tempfile.mkstemp(dir=self._file.parent, prefix=".digests-")
        with os.fdopen(handle, "w") as file:
            json.dump(known, file)
        Path(name).replace(self._file)
