"""Reads a model file and computes its digest, in a process of its own: hundreds of gigabytes of reading must not take
turns with the event loop.

stdin: one JSON line, `{"path": …}`. stdout: `{"read_bytes": n, "total_bytes": n}` now and then, and at the end
`{"digest": …, "key": …, "size_bytes": n}` or `{"error": …}`.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sys
import time
from pathlib import Path

from llama_orch.models.digest import CHUNK_BYTES, file_key
from llama_orch.workers.lifeline import die_with_parent

REPORT_S = 0.1
NICENESS = 10


def main() -> None:
    die_with_parent()
    os.nice(NICENESS)
    path = Path(json.loads(sys.stdin.buffer.readline())["path"])
    try:
        report(**hashed(path))
    except OSError as error:
        report(error=f"the file cannot be read: {error.strerror}")


def hashed(path: Path) -> dict[str, object]:
    """The last line's fields. A file that changes while it is read has no digest."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb", buffering=0) as content:
        before = os.fstat(descriptor)
        if not stat.S_ISREG(before.st_mode):
            return {"error": "it is not a regular file"}
        digest, read_bytes, next_report = hashlib.sha256(), 0, time.monotonic()
        while chunk := content.read(CHUNK_BYTES):
            digest.update(chunk)
            read_bytes += len(chunk)
            if time.monotonic() >= next_report:
                report(read_bytes=read_bytes, total_bytes=before.st_size)
                next_report = time.monotonic() + REPORT_S
        key = file_key(path, os.fstat(descriptor))
        if key != file_key(path, before) or read_bytes != before.st_size:
            return {"error": "the file changed while it was read; verify it again"}
    return {"digest": f"sha256:{digest.hexdigest()}", "key": key, "size_bytes": read_bytes}


def report(**fields: object) -> None:
    print(json.dumps(fields), flush=True)


if __name__ == "__main__":
    main()
