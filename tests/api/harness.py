"""The application on a real socket, and a client that sends whatever bytes a test wants to."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn

from llama_orch.api.app import build_app
from llama_orch.api.protocol import HttpProtocol
from llama_orch.contract.config import MetricsSettings, ServerSettings, Settings

from .service_fake import FakeService

TOKEN = "s3cret-t\u00f6ken"
BEARER = b"Bearer " + TOKEN.encode()
MAX_BODY_BYTES = 65536
SETTINGS = Settings(server=ServerSettings(max_body_bytes=MAX_BODY_BYTES, allowed_hosts=["Workstation.lan"]))
OPEN_METRICS = Settings(metrics=MetricsSettings(require_token=False))
TIMEOUT_S = 30.0  # a test that hangs fails; nothing waits for it

HeaderList = list[tuple[str, bytes]]


@dataclass
class Answer:
    http_status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def correlation_id(self) -> str:
        (value,) = self.headers.get_all("X-Correlation-Id") or [""]
        return value


@dataclass
class Server:
    port: int
    service: FakeService

    def connect(self, data: bytes) -> socket.socket:
        client = socket.create_connection(("127.0.0.1", self.port), TIMEOUT_S)
        client.sendall(data)
        return client

    def exchange(self, data: bytes, method: str = "GET") -> Answer:
        with closing(self.connect(data)) as client:
            response = http.client.HTTPResponse(client, method=method)
            response.begin()
            return Answer(response.status, response.headers, response.read())

    def call(self, method: str, target: str, headers: HeaderList | None = None, body: bytes | None = None) -> Answer:
        """With the token and a Host, unless `headers` says otherwise."""
        return self.exchange(a_request(method, target, headers, body), method)


def a_request(method: str, target: str, headers: HeaderList | None = None, body: bytes | None = None) -> bytes:
    """The request's bytes. A header with an empty value in `headers` leaves the default one out."""
    given = headers or []
    defaults: HeaderList = [("Host", b"localhost"), ("Authorization", BEARER), ("Connection", b"close")]
    if body is not None:
        defaults += [("Content-Type", b"application/json"), ("Content-Length", str(len(body)).encode())]
    names = {name.lower() for name, _ in given}
    lines = [pair for pair in defaults if pair[0].lower() not in names] + [pair for pair in given if pair[1]]
    head = b"".join(name.encode() + b": " + value + b"\r\n" for name, value in lines)
    return f"{method} {target} HTTP/1.1\r\n".encode("latin-1") + head + b"\r\n" + (body or b"")


@contextmanager
def serving(settings: Settings = SETTINGS, *, token: str = TOKEN, validate_responses: bool = False) -> Iterator[Server]:
    service = FakeService()
    app = build_app(service, token=token, settings=settings, validate_responses=validate_responses)
    with serving_app(app) as port:
        yield Server(port, service)


@contextmanager
def serving_app(app: Any) -> Iterator[int]:
    """Serve on a free port; clients wait in the listening socket's backlog until the server has come up."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            loop="uvloop",
            http=HttpProtocol,
            ws="none",
            lifespan="auto",
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=1,
        )
    )
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(TIMEOUT_S)
        listener.close()
