"""What the bodies of many requests hold in memory at once is bounded; who finds no room is told when to come again."""

from __future__ import annotations

import asyncio
import json
import select
import socket
import threading
from contextlib import ExitStack, closing
from http.client import HTTPResponse, IncompleteRead
from typing import Any

import pytest
from msgspec import structs

from llama_orch.api import bodies
from tests.live.client import until

from .artifacts_fake import FakeArtifacts
from .harness import MAX_BODY_BYTES, SETTINGS, Answer, Server, a_request, serving

pytestmark = pytest.mark.spec("HP-ERR-2", "HP-ART-1")

AT_ONCE = bodies.BODIES_MIN  # of the largest size


@pytest.fixture
def busy(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A store that does nothing before it is told to: the numbers of those that wait, and the word to go on."""
    monkeypatch.setattr(bodies, "HELD_MIN_BYTES", 0)
    go_on, waiting, store = threading.Event(), list[int](), FakeArtifacts.put_artifact

    async def slow(self: FakeArtifacts, artifact: Any) -> Any:
        waiting.append(artifact.content["n"])
        await asyncio.to_thread(go_on.wait)
        return await store(self, artifact)

    monkeypatch.setattr(FakeArtifacts, "put_artifact", slow)
    yield waiting, go_on
    go_on.set()


def a_put(number: int) -> bytes:
    """As large as can be."""
    body = json.dumps({"kind": "other", "content": {"n": number, "text": ""}}).encode()
    body = body.replace(b'""', b'"%b"' % (b"x" * (MAX_BODY_BYTES - len(body))))
    return a_request("POST", "/v1/artifacts", body=body)


def is_answered(client: socket.socket) -> bool:
    return bool(select.select([client], [], [], 0)[0])


def answer_of(client: socket.socket) -> Answer:
    response = HTTPResponse(client)
    response.begin()
    return Answer(response.status, response.headers, response.read())


def test_a_burst_holds_no_more_than_the_bound(busy: tuple[list[int], threading.Event]) -> None:
    """So many wait for the store, and the others are refused at once. What has no body is served meanwhile, and all are
    once there is room."""
    waiting, go_on = busy
    with serving(validate_responses=True) as server, ExitStack() as stack:
        clients: list[socket.socket] = []
        for number in range(3 * AT_ONCE):
            client = stack.enter_context(closing(server.connect(a_put(number))))
            until(lambda client=client, number=number: is_answered(client) or number in waiting)  # type: ignore[misc]
            clients.append(client)
        assert waiting == list(range(AT_ONCE))
        for client in clients[AT_ONCE:]:
            refused = answer_of(client)
            assert (refused.http_status, refused.json["code"]) == (503, "REPLICA_EXHAUSTED")
            assert refused.json["policy_label"] == "bodies"
            assert refused.headers["Retry-After"] == "1"
        assert server.call("GET", "/healthz").http_status == 200
        go_on.set()
        assert {answer_of(client).http_status for client in clients[:AT_ONCE]} == {201}
        assert put_again(server) == [201] * (3 * AT_ONCE)


def test_who_sends_nothing_holds_nothing(busy: tuple[list[int], threading.Event]) -> None:
    """A length that was said is not counted, what has come of a body that breaks off is given back."""
    _, go_on = busy
    go_on.set()
    head, _, body = a_put(0).partition(b"\r\n\r\n")
    with serving() as server, ExitStack() as stack:
        for part in (b"", body[:-1]):
            for _ in range(3 * AT_ONCE):
                client = stack.enter_context(closing(server.connect(head + b"\r\n\r\n" + part)))
                if part:
                    client.shutdown(socket.SHUT_WR)
                    until(lambda client=client: is_answered(client))  # type: ignore[misc]
        assert put_again(server) == [201] * (3 * AT_ONCE)


def test_slow_readers_of_artifacts_hold_no_more_than_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """So many may read at once; the others are told to come again, and can once somebody has read or is cut off."""
    monkeypatch.setattr(bodies, "HELD_MIN_BYTES", 10 << 20)
    settings = structs.replace(SETTINGS, server=structs.replace(SETTINGS.server, max_body_bytes=8 << 20))
    content = {"text": "x" * (4 << 20)}
    with serving(settings) as server, ExitStack() as stack:
        put = server.call("POST", "/v1/artifacts", body=json.dumps({"kind": "other", "content": content}).encode())
        path = f"/v1/artifacts/{put.json['id']}"
        slow = [stack.enter_context(closing(server.connect(a_request("GET", path)))) for _ in range(2)]
        until(lambda: all(is_answered(client) for client in slow))
        refused = server.call("GET", path)
        assert (refused.http_status, refused.json["code"]) == (503, "REPLICA_EXHAUSTED")
        assert answer_of(slow[0]).json["content"] == content
        assert server.call("GET", path).json["content"] == content
        monkeypatch.setattr(bodies, "PIECE_LIMIT_S", 0.5)
        fourth = stack.enter_context(closing(server.connect(a_request("GET", path))))
        until(lambda: is_answered(fourth))
        with pytest.raises((ConnectionError, IncompleteRead)):
            _read_after_a_while(fourth, server, path)


def _read_after_a_while(client: socket.socket, server: Server, path: str) -> Answer:
    """Once its place was given to somebody else."""
    until(lambda: server.call("GET", path).http_status == 200)
    return answer_of(client)


def put_again(server: Server) -> list[int]:
    """One after the other."""
    return [server.exchange(a_put(number), "POST").http_status for number in range(100, 100 + 3 * AT_ONCE)]
