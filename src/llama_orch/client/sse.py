"""Server-Sent Events out of bytes, as the WHATWG's standard has it.

Invariant: a message is handed out once it is complete; one that the connection cut off never is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

MESSAGE_BYTES_MAX = 1 << 24
_LINE_END = re.compile(rb"\r\n|\n|\r")
_BOM = b"\xef\xbb\xbf"


class SseMessage(NamedTuple):
    event: str
    data: str
    id: str


class SseTooLarge(ValueError):
    """A message that is larger than any of the contract's."""


class SseParser:
    """Feed it chunks as they come. `retry_ms` is the wait before a reconnect that the server asked for."""

    def __init__(self, last_id: str = "") -> None:
        self.last_id = last_id
        self.retry_ms: int | None = None
        self._rest = bytearray()
        self._searched = 0  # so far there is no line end in the rest: a long line is not looked through again and again
        self._held_bytes = 0
        self._is_first = True
        self._event, self._id = "", last_id
        self._data: list[str] = []

    def feed(self, chunk: bytes) -> Iterator[SseMessage]:
        self._rest += chunk
        for line in self._lines():
            self._held_bytes += len(line)
            if line:
                self._take_field(line)
            elif message := self._dispatch():
                yield message
        if len(self._rest) + self._held_bytes > MESSAGE_BYTES_MAX:
            raise SseTooLarge(f"a message of the stream is larger than {MESSAGE_BYTES_MAX} bytes")

    def _lines(self) -> Iterator[bytes]:
        start, rest = 0, bytes(self._rest) if _LINE_END.search(self._rest, self._searched) else b""
        for end in _LINE_END.finditer(rest, self._searched):
            if end[0] == b"\r" and end.end() == len(rest):
                break  # perhaps half of \r\n
            yield self._without_bom(rest[start : end.start()])
            start = end.end()
        del self._rest[:start]
        self._searched = len(self._rest) - self._rest.endswith(b"\r")

    def _without_bom(self, line: bytes) -> bytes:
        is_first, self._is_first = self._is_first, False
        return line.removeprefix(_BOM) if is_first else line

    def _take_field(self, line: bytes) -> None:
        name, _, value = line.decode("utf-8", "replace").partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
        elif name == "event":
            self._event = value
        elif name == "id" and "\0" not in value:
            self._id = value
        elif name == "retry" and value.isascii() and value.isdigit() and len(value) <= 9:
            self.retry_ms = int(value)
        # Anything else is a comment (its name is empty) or a field that is not known.

    def _dispatch(self) -> SseMessage | None:
        self.last_id = self._id
        message = SseMessage(self._event or "message", "\n".join(self._data), self.last_id) if self._data else None
        self._clear()
        return message

    def _clear(self) -> None:
        self._event, self._data, self._held_bytes = "", [], 0
