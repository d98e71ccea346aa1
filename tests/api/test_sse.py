"""Streams: what the client gets, and that every end closes the reader and leaves no task."""

from __future__ import annotations

import asyncio
import http.client
import socket
import struct
from collections.abc import MutableMapping
from contextlib import closing
from typing import Any

import pytest

from llama_orch.api.sse import HEARTBEAT_S, KEEP_ALIVE, SEND_LIMIT_S, EventStream
from llama_orch.testing.loop import run

from .harness import TIMEOUT_S, Server, a_request, serving_app
from .service_fake import BREAKING_TASK, CROWDED_TASK, ENDING_TASK, ENDLESS_TASK, FRAMES, SECRET, FakeReader
from .test_bad_input import assert_envelope


def stream_of(task_id: str) -> str:
    return f"/v1/tasks/{task_id}/stream"


@pytest.mark.spec("HP-STR-1", "HP-STR-4", "HP-SEC-2")
def test_a_stream_passes_the_frames_on(checking_server: Server) -> None:
    """The reader's bytes come as they are, with the headers that keep proxies from holding them back."""
    answer = checking_server.call("GET", stream_of(ENDING_TASK), [("X-Correlation-Id", b"stream-1")])
    assert answer.body == b"".join(FRAMES)
    assert answer.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["X-Accel-Buffering"] == "no"
    assert answer.correlation_id == "stream-1"
    assert checking_server.service.readers[ENDING_TASK].closed.is_set()


@pytest.mark.spec("HP-STR-7")
def test_last_event_id_goes_on_behind_it(server: Server) -> None:
    """The stream goes on behind the frame that the client names."""
    assert server.call("GET", stream_of(ENDING_TASK), [("Last-Event-ID", b"1")]).body == FRAMES[2]
    assert server.call("GET", stream_of(ENDING_TASK), [("Last-Event-ID", b"99")]).body == b""


def test_head_opens_and_closes(server: Server) -> None:
    """HEAD on an endless stream ends at once and closes its reader."""
    assert server.call("HEAD", stream_of(ENDLESS_TASK)).http_status == 200
    assert server.service.readers[ENDLESS_TASK].closed.is_set()


@pytest.mark.spec("HP-ERR-1", "HP-ERR-2")
def test_a_refused_stream_is_an_ordinary_error(server: Server) -> None:
    """What goes wrong before the first frame has a status and the envelope."""
    answer = server.call("GET", stream_of(CROWDED_TASK))
    assert (answer.http_status, answer.headers["X-Backoff-Ms"]) == (503, "500")
    assert_envelope(answer, "REPLICA_EXHAUSTED")
    assert server.call("GET", stream_of("00000000-0000-4000-8000-000000000000")).http_status == 404


def test_a_broken_stream_breaks_the_connection(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    """A failure behind the first frame cuts the response short, so that it does not look whole, and is in the log."""
    with closing(
        server.connect(a_request("GET", stream_of(BREAKING_TASK), [("X-Correlation-Id", b"broken")]))
    ) as client:
        response = http.client.HTTPResponse(client)
        response.begin()
        with pytest.raises(http.client.IncompleteRead) as raised:
            response.read()
    assert SECRET.encode() not in raised.value.partial
    assert server.service.readers[BREAKING_TASK].closed.wait(TIMEOUT_S)
    assert "broken" in caplog.text


@pytest.mark.spec("HP-STR-7")
@pytest.mark.parametrize("ending", ["FIN", "RST"])
def test_a_client_that_leaves_closes_its_reader(server: Server, ending: str) -> None:
    """Whichever way a client goes while no frame comes, its reader is closed."""
    client = server.connect(a_request("GET", stream_of(ENDLESS_TASK)))
    received = b""
    while FRAMES[-1] not in received:
        received += client.recv(65536)
    if ending == "RST":
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    assert server.service.readers[ENDLESS_TASK].closed.wait(TIMEOUT_S)


class Client:
    """The ASGI side of a client. `reads_for_s`: how long it takes to read each message; `leaves_after_s`: when it
    goes."""

    def __init__(self, *, reads_for_s: float = 0.0, leaves_after_s: float | None = None) -> None:
        self.reads_for_s, self.leaves_after_s = reads_for_s, leaves_after_s
        self.received: list[tuple[float, bytes]] = []
        self.is_complete = False

    async def receive(self) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        gone = loop.create_future()
        if self.leaves_after_s is not None:
            loop.call_at(self.leaves_after_s, gone.set_result, None)
        await gone
        return {"type": "http.disconnect"}

    async def send(self, message: MutableMapping[str, Any]) -> None:
        loop = asyncio.get_running_loop()
        if message["type"] == "http.response.start":
            return
        if message["body"]:
            read = loop.create_future()
            loop.call_later(self.reads_for_s, read.set_result, None)
            await read
            self.received.append((loop.time(), message["body"]))
        self.is_complete = not message.get("more_body", False)


async def stream(reader: FakeReader, client: Client) -> set[asyncio.Task[Any]]:
    """Run one stream to its end, an hour at most; returns the tasks that it left behind."""
    scope = {"type": "http", "method": "GET", "headers": []}
    async with asyncio.timeout(3600.0):
        await EventStream(lambda after: reader)(scope, client.receive, client.send)
    return asyncio.all_tasks() - {asyncio.current_task()}


@pytest.mark.spec("HP-STR-7")
def test_a_quiet_stream_has_a_heartbeat() -> None:
    """A comment comes each 15 s in which nothing else was sent, until the client goes."""
    reader, client = FakeReader([], then="wait"), Client(leaves_after_s=4.5 * HEARTBEAT_S)
    left = run(stream(reader, client))
    assert client.received == [(n * HEARTBEAT_S, KEEP_ALIVE) for n in (1, 2, 3, 4)]
    assert reader.closed.is_set()
    assert not left
    assert not client.is_complete


@pytest.mark.spec("HP-STR-7")
def test_heartbeats_wait_for_silence() -> None:
    """A slow but reading client gets its frames and no comment in between them."""
    reader, client = FakeReader(FRAMES, then="wait"), Client(reads_for_s=20.0, leaves_after_s=70.0)
    run(stream(reader, client))
    assert client.received == [(20.0, FRAMES[0]), (40.0, FRAMES[1]), (60.0, FRAMES[2])]


@pytest.mark.spec("HP-STR-7")
@pytest.mark.parametrize("frames", [FRAMES, []], ids=["at a frame", "at a heartbeat"])
def test_a_client_that_does_not_read_is_given_up(frames: list[bytes]) -> None:
    """A send that is stuck for 30 s ends the stream and closes the reader."""
    reader, client = FakeReader(frames, then="wait"), Client(reads_for_s=1e6)
    left = run(stream_until(reader, client, 2 * SEND_LIMIT_S))
    assert client.received == []
    assert reader.closed.is_set()
    assert not left


async def stream_until(reader: FakeReader, client: Client, limit_s: float) -> set[asyncio.Task[Any]]:
    async with asyncio.timeout(limit_s):
        return await stream(reader, client)


@pytest.mark.spec("HP-STR-7")
def test_a_socket_that_is_not_read_is_given_up() -> None:
    """The same on a real connection: frames that fill its buffers end the stream, with the limit set short."""
    reader = FakeReader([b": " + b"x" * 1_000_000 + b"\n\n"] * 50, then="wait")
    app = EventStream(lambda after: reader, send_limit_s=0.05, heartbeat_s=0.05)
    with serving_app(app) as port, closing(socket.create_connection(("127.0.0.1", port), TIMEOUT_S)) as client:
        client.sendall(a_request("GET", "/"))
        assert reader.closed.wait(TIMEOUT_S)


@pytest.mark.spec("HP-STR-7")
def test_cancellation_closes_the_reader() -> None:
    """The server's own end, a cancelled task, closes the reader and leaves no task either."""

    async def cancelled_after(limit_s: float) -> tuple[FakeReader, int]:
        reader = FakeReader(FRAMES, then="wait")
        with pytest.raises(TimeoutError):
            await stream_until(reader, Client(), limit_s)
        return reader, len(asyncio.all_tasks())

    reader, tasks = run(cancelled_after(1.0))
    assert reader.closed.is_set()
    assert tasks == 1


def test_a_whole_stream_ends_cleanly() -> None:
    """After the last frame comes the end of the response, and no helper is left."""
    reader, client = FakeReader(FRAMES), Client()
    left = run(stream(reader, client))
    assert [body for _, body in client.received] == FRAMES
    assert client.is_complete
    assert not left
