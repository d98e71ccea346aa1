"""Digests of model files for the catalog: remembered ones at once, others by a process of their own that tells how far
it is (workers/hasher.py)."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from llama_orch.engines.process import exit_reason, worker_environment
from llama_orch.models.catalog import Finding
from llama_orch.models.digest import Digests, file_key

# Bytes read so far, and bytes in all.
Progress = Callable[[int, int], None]
# The file's path, who hears of the progress, seconds since the epoch -> what was found. Raises nothing for a bad file.
Examine = Callable[[Path, Progress, Callable[[], float]], Awaitable[Finding]]

_LINE_BYTES_MAX = 1 << 16


class Hashing:
    """A verification that is under way."""

    def __init__(self) -> None:
        self.is_running = False
        self.read_bytes = 0
        self.total_bytes: int | None = None
        self.began_s: float | None = None
        self.done = asyncio.Event()

    def progress(self, read_bytes: int, total_bytes: int) -> None:
        self.read_bytes, self.total_bytes = read_bytes, total_bytes


class HashingProcess:
    """Examines one file at a time for each call. `digests` remembers."""

    def __init__(self, digests: Digests) -> None:
        self._digests = digests

    async def __call__(self, path: Path, progress: Progress, wall: Callable[[], float]) -> Finding:
        try:
            known = await asyncio.to_thread(self._known, path)
        except OSError as error:
            return Finding(at_s=wall(), error=f"the file cannot be read: {error.strerror}")
        if known is not None:
            key, digest, size_bytes = known
            return Finding(at_s=wall(), key=key, digest=digest, size_bytes=size_bytes)
        try:
            said = await _hashed(path, progress)
        except OSError as error:  # no process can be started: too many are running, or no descriptor is left
            return Finding(at_s=wall(), error=f"no process could read the file: {error.strerror}; verify it again")
        if "digest" not in said:
            return Finding(at_s=wall(), error=said["error"])
        await asyncio.to_thread(self._digests.remember, said["key"], said["digest"])
        return Finding(at_s=wall(), **said)

    def _known(self, path: Path) -> tuple[str, str, int] | None:
        key, size_bytes = _seen(path)
        digest = self._digests.known(path)
        return None if digest is None else (key, digest, size_bytes)


def _seen(path: Path) -> tuple[str, int]:
    """The file's key and its size."""
    about = path.stat()
    return file_key(path, about), about.st_size


async def _hashed(path: Path, progress: Progress) -> dict[str, Any]:
    """The last line of the process, or what became of it. Whoever stops waiting ends it."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "llama_orch.workers.hasher"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=worker_environment(os.environ, ()),
        limit=_LINE_BYTES_MAX,
    )
    said: dict[str, Any] = {}
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps({"path": str(path)}).encode() + b"\n")
        process.stdin.close()
        async for line in process.stdout:
            said = json.loads(line)
            if "read_bytes" in said:
                progress(said["read_bytes"], said["total_bytes"])
        await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if "digest" in said or "error" in said:
        return said
    return {"error": f"the process that read the file {exit_reason(process.returncode)}; verify it again"}


def examine_with(digest: Callable[[Path], Awaitable[str]]) -> Examine:
    """The same by way of a function that gives a file's digest, for services without processes (rehearsals)."""

    async def examine(path: Path, progress: Progress, wall: Callable[[], float]) -> Finding:
        try:
            key, size_bytes = _seen(path)
            return Finding(at_s=wall(), key=key, digest=await digest(path), size_bytes=size_bytes)
        except OSError as error:
            return Finding(at_s=wall(), error=f"the file cannot be read: {error.strerror}")

    return examine
