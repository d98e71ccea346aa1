"""One model file from elsewhere, through the outbound door, into a partial file that can be taken up again.

Invariants. Beside the partial file stands what is known of it: the other side's mark of the content (a strong ETag) and
how many bytes of it are on the disk for certain; what is beyond them is thrown away, so that neither kill -9 nor a
power cut leaves a hole. It is taken up only where the other side says that its content is still the same. Nothing here
gives a file its final name.

The hub's `resolve` address is used directly and not huggingface_hub, which makes its own connections: they would go
past the door. HF_ENDPOINT and HF_TOKEN are honoured as that library does; the door sends the token to that origin
alone.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
from collections.abc import Callable, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote

import msgspec

from llama_orch.errors import InvalidParams, LlorchError, StorageUnavailable, UpstreamFailed
from llama_orch.outbound.door import Limits, Outbound, Reply
from llama_orch.policy.urls import BadUrl, parse_target

FILE_BYTES_MAX = 1 << 40
SPARE_BYTES = 1 << 30  # of the disk, which a fetch leaves free
SYNC_BYTES = 32 << 20  # between two notes of what is on the disk for certain
ATTEMPTS_MAX = 5  # in a row that brought no more than
PROGRESS_BYTES = 1 << 20
PACE_S, PACE_BYTES = 60.0, 1 << 16  # what has to come in such a time: fetches come one after the other, and others wait
BACKOFF_S, BACKOFF_MAX_S = 1.0, 60.0
HUB = "https://huggingface.co"
_BUSY = (
    HTTPStatus.TOO_MANY_REQUESTS,
    HTTPStatus.SERVICE_UNAVAILABLE,
    HTTPStatus.BAD_GATEWAY,
    HTTPStatus.GATEWAY_TIMEOUT,
)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_range = re.compile(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18})").fullmatch
_whole = re.compile(r"bytes \*/(\d{1,18})").fullmatch
_strong_etag = re.compile(r'"[\x21\x23-\x7e]{1,256}"').fullmatch

Progress = Callable[[int, int | None], None]


def url_of(source: str, env: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """Where the file of an `hf:` or `https:` source is, and the headers for that origin. Raises InvalidParams."""
    kind, _, rest = source.partition(":")
    if kind == "https":
        try:
            parse_target(source)
        except BadUrl as error:  # it may hold a password: it is not repeated
            raise InvalidParams(f"the reference is no URL that is fetched: {error}") from error
        return source, {}
    parts = rest.split("/")
    if len(parts) < 3 or not all(_NAME.fullmatch(part) for part in parts):
        raise InvalidParams(f"{source!r} is no file of the hub; write hf:org/repo/file.gguf")
    organisation, repository, *path = parts
    endpoint, token = env.get("HF_ENDPOINT", "").rstrip("/") or HUB, env.get("HF_TOKEN", "").strip()
    url = f"{endpoint}/{organisation}/{repository}/resolve/main/{quote('/'.join(path))}"
    return url, {"authorization": f"Bearer {token}"} if token else {}


def note_of(partial: Path) -> Path:
    """Where that which is known of a partial file stands."""
    return partial.with_suffix(".json")


class Note(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a partial file."""

    url: str
    etag: str
    kept_bytes: int


class _TryAgain(Exception):
    """It did not come to its end, and may yet. `wait_s`: what the other side asks for."""

    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class Download:
    """One file. `sleep` takes seconds. `size_bytes`: what was declared, if anything."""

    def __init__(
        self,
        outbound: Outbound,
        source: str,
        partial: Path,
        progress: Progress,
        *,
        size_bytes: int | None = None,
        env: Mapping[str, str] = os.environ,
        sleep: Callable[[float], object] = asyncio.sleep,
    ) -> None:
        self._outbound = outbound
        self._url, self._headers = url_of(source, env)
        self._partial = partial
        self._note_path = note_of(partial)
        self._progress = progress
        self._size_bytes = size_bytes
        self._sleep = sleep

    @property
    def url(self) -> str:
        return self._url

    async def run(self) -> None:
        """Until the partial file is whole. Raises PolicyDenied, UpstreamFailed, StorageUnavailable."""
        failures, before = 0, -PROGRESS_BYTES
        while True:
            try:
                return await self._attempt()
            except _TryAgain as error:
                kept = self._kept()
                failures = 0 if kept >= before + PROGRESS_BYTES else failures + 1
                before = kept if failures == 0 else before
                if failures >= ATTEMPTS_MAX:
                    raise UpstreamFailed(f"the fetch was given up after {ATTEMPTS_MAX} attempts: {error}") from error
                wait_s = error.wait_s or BACKOFF_S * 2**failures
                await self._sleep(min(wait_s, BACKOFF_MAX_S))  # type: ignore[misc]  # a coroutine

    async def _attempt(self) -> None:
        note = self._note()
        kept = 0 if note is None else note.kept_bytes
        limits = Limits(FILE_BYTES_MAX, total_s=None)
        asked = {} if note is None else {"range": f"bytes={kept}-", "if-range": note.etag}
        try:
            fetch = self._outbound.fetch(self._url, purpose="model", limits=limits, headers=self._headers | asked)
            async with fetch as reply:
                if reply.http_status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and note is not None:
                    return self._was_whole(reply, kept)
                await self._receive(reply, *self._beginning(reply, kept))
        except UpstreamFailed as error:
            raise _TryAgain(error.message) from error

    def _beginning(self, reply: Reply, kept: int) -> tuple[int, int | None]:
        """Where the body goes on in the file, and how large the whole is."""
        match reply.http_status:
            case HTTPStatus.OK:
                length = reply.headers.get("content-length", "")
                total = self._total(int(length) if length.isdecimal() and len(length) < 19 else None)
                if total is None and "chunked" not in reply.headers.get("transfer-encoding", ""):
                    raise _Refused(  # a connection that breaks would look like the file's end
                        f"{reply.target.host} does not say how large the file is; declare its size in a manifest"
                    )
                return 0, total
            case HTTPStatus.PARTIAL_CONTENT:
                found = _range(reply.headers.get("content-range", ""))
                if found is None or int(found[1]) != kept:
                    self._forget()
                    raise _TryAgain(f"{reply.target.host} sends another part than was asked for")
                return kept, self._total(int(found[2]))
            case status if status in _BUSY:
                after = reply.headers.get("retry-after", "")
                wait_s = float(after) if after.isdecimal() and len(after) < 6 else None
                raise _TryAgain(f"{reply.target.host} is busy ({status})", wait_s)
            case status:
                raise _Refused(f"{reply.target.host} answers {status} instead of the file")

    def _total(self, total: int | None) -> int | None:
        if total is not None and self._size_bytes not in (None, total):
            raise _Refused(f"the file has {total} bytes there, and {self._size_bytes} were declared")
        total = self._size_bytes if total is None else total
        if total is not None and total > self._bytes_max():
            raise StorageUnavailable(f"the file has {total} bytes, for which there is no room; free some space")
        return total

    def _bytes_max(self) -> int:
        """How large the file may get without filling the disk."""
        held = self._partial.stat().st_size if self._partial.exists() else 0
        room = shutil.disk_usage(self._partial.parent).free - SPARE_BYTES + held
        return max(0, min(FILE_BYTES_MAX, room))

    async def _receive(self, reply: Reply, start: int, total: int | None) -> None:
        etag = reply.headers.get("etag", "")
        etag = etag if _strong_etag(etag) else ""
        received, received_max = start, self._bytes_max()
        self._progress(received, total)
        with self._opened(start) as file:
            try:
                pieces, held = [], 0
                pace = _Pace(received)
                async for chunk in reply.chunks():
                    pieces.append(chunk)
                    held += len(chunk)
                    received += len(chunk)
                    if total is not None and received > total:
                        raise _TryAgain(f"{reply.target.host} sends more than it said")
                    if received > received_max:  # it did not say
                        raise StorageUnavailable(f"there is no room for more than {received_max} bytes of the file")
                    self._progress(received, total)
                    if pace.is_too_slow(received):
                        raise _TryAgain(f"{reply.target.host} sends too slowly")
                    if held >= SYNC_BYTES:
                        await asyncio.to_thread(self._write, file, pieces, etag)
                        pieces, held = [], 0
            finally:
                self._write(file, pieces, etag)  # also what came before it broke off
        if total is not None and received != total:
            raise _TryAgain(f"{reply.target.host} broke off after {received} of {total} bytes")
        self._progress(received, received)

    def _opened(self, start: int) -> BinaryIO:
        descriptor = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        file = os.fdopen(descriptor, "r+b", buffering=0)
        if start == 0:
            self._note_path.unlink(missing_ok=True)
        file.truncate(start)
        file.seek(start)
        return file

    def _write(self, file: BinaryIO, pieces: list[bytes], etag: str) -> None:
        """First the bytes, then the note that they are there."""
        left = memoryview(b"".join(pieces))
        while left:  # on a disk that gets full a write takes less than it was given, and only the next one fails
            left = left[file.write(left) :]
        os.fsync(file.fileno())
        if etag:
            note = msgspec.json.encode(Note(url=self._url, etag=etag, kept_bytes=file.tell()))
            temporary = self._note_path.with_suffix(".new")
            temporary.write_bytes(note)
            temporary.replace(self._note_path)

    def _note(self) -> Note | None:
        """None where there is nothing to take up."""
        try:
            note = msgspec.json.decode(self._note_path.read_bytes(), type=Note)
            is_there = note.url == self._url and 0 < note.kept_bytes <= self._partial.stat().st_size
        except (OSError, msgspec.MsgspecError):
            return None
        return note if is_there else None

    def _kept(self) -> int:
        note = self._note()
        return 0 if note is None else note.kept_bytes

    def _was_whole(self, reply: Reply, kept: int) -> None:
        """Nothing is behind what is there already."""
        found = _whole(reply.headers.get("content-range", ""))
        if found is None or int(found[1]) != kept:
            self._forget()
            raise _TryAgain(f"{reply.target.host} has another file now")
        self._total(kept)
        os.truncate(self._partial, kept)
        self._progress(kept, kept)

    def _forget(self) -> None:
        self._note_path.unlink(missing_ok=True)

    def discard(self) -> None:
        """The partial file is of no use."""
        self._forget()
        self._partial.unlink(missing_ok=True)


class _Pace:
    """Whether the other side keeps up a pace, from when it began to send."""

    def __init__(self, received: int) -> None:
        self._since_s, self._had = asyncio.get_running_loop().time(), received

    def is_too_slow(self, received: int) -> bool:
        now = asyncio.get_running_loop().time()
        if now < self._since_s + PACE_S:
            return False
        came, self._since_s, self._had = received - self._had, now, received
        return came < PACE_BYTES


class _Refused(LlorchError):
    """The other side will not give it, however often it is asked."""

    code = UpstreamFailed.code
