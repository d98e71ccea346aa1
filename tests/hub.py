"""Another machine, played on loopback: it speaks the hub's `resolve` protocol (a redirect to where the files are,
ranges, entity tags) and misbehaves where a test tells it to."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SLOW_BYTES, SLOW_S = 1 << 16, 0.02


@dataclass
class Hub:
    """`content` is what every path of `…/resolve/main/…` leads to. `faults` are taken one for each request of the file:
    a status, `truncate` (half of what was asked for, then the connection breaks), `more` (a byte more than was said),
    `elsewhere` (another part than was asked for), `reset` (nothing). `heard`: path and headers of each request."""

    content: bytes
    etag: str | None = '"v1"'
    has_ranges: bool = True
    length: str = "said"  # or `chunked`, or `unsaid`: the end of the connection is the end of the file
    faults: list[Any] = field(default_factory=list)
    heard: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    hold_after: int | None = None  # bytes of the next answer; then it waits for `go_on`
    held: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)
    slow_after: int | None = None  # bytes of the file; then it comes in small pieces, SLOW_S apart
    is_slow: threading.Event = field(default_factory=threading.Event)  # some of them have come
    url: str = ""
    files_url: str = ""

    def asked_for(self) -> list[str | None]:
        """The ranges that were asked for, of the files' host."""
        return [headers.get("range") for path, headers in self.heard if path.startswith("/files/")]


@contextmanager
def a_hub(content: bytes, **fields: Any) -> Iterator[Hub]:
    hub = Hub(content, **fields)
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub})) for _ in range(2)]
    hub.url, hub.files_url = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
    for server in servers:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield hub
    finally:
        hub.go_on.set()
        for server in servers:
            server.shutdown()
            server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.close_connection = True
        self.hub.heard.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
        if "/resolve/main/" in self.path and not self.path.startswith("/files/"):
            return self._say(302, b"", Location=f"{self.hub.files_url}/files{self.path}")
        if not self.path.startswith("/files/"):
            return self._say(404, b"")
        fault = self.hub.faults.pop(0) if self.hub.faults else None
        if isinstance(fault, int):
            return self._say(fault, b"busy", **{"Retry-After": "7"})
        if fault != "reset":
            with suppress(ConnectionError):  # who asked has gone, or was killed
                self._send_file(fault)

    def _send_file(self, fault: str | None) -> None:
        content, etag = self.hub.content, self.hub.etag
        start = self._start()
        tags = {} if etag is None else {"ETag": etag}
        if start is not None and start >= len(content):
            return self._say(416, b"", **{"Content-Range": f"bytes */{len(content)}"})
        part = content[start or 0 :]
        if start is not None:
            first = start + 1 if fault == "elsewhere" else start
            tags["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        if self.hub.slow_after is None:
            return self._say(200 if start is None else 206, part, fault, **tags)
        fast = max(0, self.hub.slow_after - (start or 0))
        self._say(200 if start is None else 206, part, fault, fast, **tags)
        self.wfile.flush()
        for place in range(fast, len(part), SLOW_BYTES):
            self.wfile.write(part[place : place + SLOW_BYTES])
            self.wfile.flush()
            self.hub.is_slow.set()
            self.hub.go_on.wait(SLOW_S)

    def _start(self) -> int | None:
        """The first byte that is to be sent, None for the whole."""
        found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        is_same = self.headers.get("If-Range") in (None, self.hub.etag)
        return int(found[1]) if found and self.hub.has_ranges and is_same else None

    def _say(
        self, status: int, body: bytes, fault: str | None = None, first: int | None = None, **headers: str
    ) -> None:
        """`first`: bytes that are sent here, of those that are announced."""
        self.send_response(status)
        how = self.hub.length if body else "said"
        if how == "said":
            self.send_header("Content-Length", str(len(body) - (fault == "more")))
        elif how == "chunked":
            self.send_header("Transfer-Encoding", "chunked")
            body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if fault == "truncate":
            body = body[: len(body) // 2]
        hold = self.hub.hold_after if body else None
        if hold is not None:
            self.hub.hold_after = None
            self.wfile.write(body[:hold])
            self.wfile.flush()
            self.hub.held.set()
            self.hub.go_on.wait()
            body = body[hold:]
        self.wfile.write(body[:first])
