"""One service in a hostile environment, and a socket that says whatever it is told to."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from tests.live.client import open_client, until
from tests.live_service import LiveService, live_service

HOSTILE_ENVIRONMENT = {
    "LLAMA_ARG_HOST": "0.0.0.0",
    "LLAMA_ARG_API_KEY": "stolen",
    "LLAMA_ARG_ENDPOINT_PROPS": "1",
    "LLAMA_API_KEY": "stolen",
    "GGML_BACKEND_PATH": "/tmp/evil.so",
    "HTTP_PROXY": "http://127.0.0.1:9",
    "HF_TOKEN": "hf_secret_of_the_user",
}
LIMIT_S = 30.0

Say = Callable[[bytes], bytes]


@pytest.fixture(scope="package")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The one folder whose files a task may name."""
    folder = tmp_path_factory.mktemp("security") / "models"
    folder.mkdir()
    return folder


@pytest.fixture(scope="package")
def service(models: Path) -> Iterator[LiveService]:
    configuration = {
        "server": {"max_streams": 8, "max_body_bytes": 1 << 20},
        "catalog": {"file_roots": [str(models)]},
        "pools": [{"id": "default", "slots": 2, "queue": {"capacity": 4}}],
    }
    with live_service(configuration, env=HOSTILE_ENVIRONMENT) as running:
        with open_client(running) as client:
            until(lambda: client.get("/v1/pools/default").json()["ready"])
        yield running


@pytest.fixture
def client(service: LiveService) -> Iterator[httpx.Client]:
    with open_client(service) as client:
        yield client


@pytest.fixture
def say(service: LiveService) -> Say:
    """Sends bytes over a connection of its own and returns all that comes back."""
    address = urlsplit(service.url)

    def exchange(data: bytes) -> bytes:
        with socket.create_connection((address.hostname, address.port), LIMIT_S) as connection:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            heard = b""
            while piece := connection.recv(1 << 16):
                heard += piece
        return heard

    return exchange
