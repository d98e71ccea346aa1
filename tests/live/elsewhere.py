"""Another machine for a service to fetch from, on loopback, in a thread of the test."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class _Elsewhere(BaseHTTPRequestHandler):
    """`/text`, `/back` (a redirect to where nobody may go), `/short` (breaks off); else a picture."""

    def do_GET(self) -> None:
        self.server.heard.append(self.path)  # type: ignore[attr-defined]
        if self.path.startswith("/text"):
            self._say(200, "text/plain; charset=utf-8", "näh".encode())
        elif self.path.startswith("/back"):
            self.send_response(302)
            self.send_header("Location", "http://127.0.0.2/")
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif self.path.startswith("/short"):
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nshort")
        else:
            self._say(404, "image/png", b"\x89PNG")

    def _say(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A caller that has lost patience is no news."""


@contextmanager
def elsewhere() -> Iterator[tuple[str, list[str]]]:
    """Its URL, and the paths that it was asked for."""
    with _Server(("127.0.0.1", 0), _Elsewhere) as server:
        server.heard = []  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", server.heard  # type: ignore[attr-defined]
        finally:
            server.shutdown()
            thread.join()
