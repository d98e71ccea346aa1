"""The client against a scripted other side: every way in which a stream can go wrong has one typed end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from llama_orch.engines.base import DecodeStalled, EngineBusy, JobRefused, WorkerLost
from llama_orch.engines.client import CompletionEvent, LlamaClient, completion_body
from llama_orch.engines.private_folder import make_private_folder, remove_private_folder

from .support import a_job, run

Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

_STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
_LAST = b'data: {"content":"","stop":true,"tokens_predicted":2,"tokens_evaluated":5,"stop_type":"limit"}\n\n'


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _sends(*parts: bytes) -> Script:
    """Another side that reads the request, sends these parts one by one and closes."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await _read_request(reader)
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.get_running_loop().run_in_executor(None, int)  # let the part leave on its own

    return script


async def _read_request(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
    return head, await reader.readexactly(length)


@asynccontextmanager
async def a_client(script: Script) -> AsyncGenerator[LlamaClient, None]:
    """A client whose other side follows the script."""
    folder = make_private_folder()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await script(reader, writer)
        except ConnectionError:
            pass
        finally:
            writer.close()

    try:
        async with await asyncio.start_unix_server(serve, folder / "s"):
            yield LlamaClient(folder / "s", "key")
    finally:
        remove_private_folder(folder)


async def _events(client: LlamaClient, idle_timeout_s: float = 30.0) -> list[CompletionEvent]:
    stream = client.complete(completion_body(a_job(), slots=1), idle_timeout_s)
    try:
        return [event async for event in stream.events()]
    finally:
        stream.close()


def _outcome(script: Script, idle_timeout_s: float = 30.0) -> list[CompletionEvent]:
    async def main() -> list[CompletionEvent]:
        async with a_client(script) as client:
            return await _events(client, idle_timeout_s)

    return run(main())


def test_events_survive_any_cut() -> None:
    """Events are lines, not packets: one byte at a time gives the same as all at once."""
    first = 'data: {"content":"é日","stop":false,"tokens_predicted":1}\n\n'.encode()
    whole = _STREAM_HEAD + _chunk(b": a comment\n\n" + first + _LAST) + b"0\r\n\r\n"
    at_once = _outcome(_sends(whole))
    assert [event.content for event in at_once] == ["é日", ""]
    assert at_once == _outcome(_sends(*(whole[i : i + 1] for i in range(len(whole)))))
    assert at_once == _outcome(_sends(_STREAM_HEAD, *(_chunk(bytes([byte])) for byte in first + _LAST)))


@pytest.mark.spec("HP-PLC-7")
@pytest.mark.parametrize(
    "parts",
    [
        pytest.param([], id="no answer"),
        pytest.param([b"HTTP/1.1 200"], id="half a head"),
        pytest.param([b"SSH-2.0-OpenSSH\r\n"], id="not HTTP"),
        pytest.param([_STREAM_HEAD], id="no body"),
        pytest.param([_STREAM_HEAD, b"0\r\n\r\n"], id="an empty body"),
        pytest.param([_STREAM_HEAD, _chunk(b'data: {"content":"x"}\n\n'), b"0\r\n\r\n"], id="no terminal event"),
        pytest.param([_STREAM_HEAD, _chunk(_LAST[:20])], id="half an event"),
        pytest.param([_STREAM_HEAD, _chunk(b"data: {nonsense\n\n")], id="not JSON"),
        pytest.param([_STREAM_HEAD, _chunk(b'data: {"content":"\xff"}\n\n')], id="not UTF-8"),
        pytest.param([_STREAM_HEAD, _chunk(b'data: {"content":5}\n\n')], id="of the wrong type"),
        pytest.param([_STREAM_HEAD, _chunk(b"data: " + b"x" * (3 << 20))], id="an endless line"),
        pytest.param(
            [_STREAM_HEAD, _chunk(b'data: {"error":{"code":500,"message":"Compute error."}}\n\n')], id="error"
        ),
        pytest.param([b"HTTP/1.1 500 X\r\nContent-Length: 2\r\n\r\n{}"], id="500"),
        pytest.param([b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 500 + b"\r\n"], id="endless headers"),
    ],
)
def test_a_broken_stream_is_a_lost_worker(parts: list[bytes]) -> None:
    """Whatever the other side sends instead of a whole stream, it is WorkerLost and nothing else."""
    with pytest.raises(WorkerLost):
        _outcome(_sends(*parts))


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(b'{"code":400,"message":"too long","type":"exceed_context_size_error"}', id="4xx"),
        pytest.param(b'{"code":500,"message":"Context size has been exceeded: too long"}', id="full context"),
    ],
)
def test_a_refused_job_leaves_the_worker_sound(fault: bytes) -> None:
    """The engine's own words come through, before the stream as in the middle of it."""
    body = b'{"error":' + fault + b"}"
    with pytest.raises(JobRefused, match="too long"):
        _outcome(_sends(b"HTTP/1.1 400 Bad\r\nContent-Length: %d\r\n\r\n" % len(body) + body))
    for word in (b"data: " + body, b"error: " + fault):
        with pytest.raises(JobRefused, match="too long"):
            _outcome(_sends(_STREAM_HEAD, _chunk(word + b"\n\n")))


def test_a_request_that_finds_no_memory_is_not_the_jobs_fault() -> None:
    """llama.cpp answers 400 when it cannot hold a request: the worker is sound, and another try may work."""
    body = b'{"error":{"code":400,"message":"std::bad_alloc","type":"invalid_request_error"}}'
    with pytest.raises(EngineBusy, match="bad_alloc"):
        _outcome(_sends(b"HTTP/1.1 400 Bad\r\nContent-Length: %d\r\n\r\n" % len(body) + body))


def test_silence_is_a_stall_and_comments_are_silence() -> None:
    """Keep-alive comments do not count as progress."""

    async def pings(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await _read_request(reader)
        writer.write(_STREAM_HEAD)
        while not writer.transport.is_closing():
            writer.write(_chunk(b": ping\n\n"))
            await asyncio.wait([asyncio.ensure_future(reader.read(1))], timeout=0.05)

    with pytest.raises(DecodeStalled):
        _outcome(pings, idle_timeout_s=0.3)


def test_a_slow_reader_is_not_a_stall() -> None:
    """Time in which nobody asks for the next event is not the engine's."""

    async def main() -> None:
        first = b'data: {"content":"x","tokens_predicted":1}\n\n'
        async with a_client(_sends(_STREAM_HEAD, _chunk(first), _chunk(_LAST), b"0\r\n\r\n")) as client:
            stream = client.complete(completion_body(a_job(), slots=1), idle_timeout_s=0.05)
            events = stream.events()
            await anext(events)
            await asyncio.wait([asyncio.ensure_future(asyncio.Event().wait())], timeout=0.3)
            assert (await anext(events)).stop
            stream.close()

    run(main())


@pytest.mark.spec("HP-STR-6")
def test_closing_the_stream_closes_the_connection() -> None:
    """The other side sees the end of file at once: that is the cancel."""

    async def main() -> None:
        seen = asyncio.Event()

        async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await _read_request(reader)
            writer.write(_STREAM_HEAD + _chunk(b'data: {"content":"x","tokens_predicted":1}\n\n'))
            await reader.read()
            seen.set()

        async with a_client(endless) as client:
            stream = client.complete(completion_body(a_job(), slots=1), idle_timeout_s=30)
            await anext(stream.events())
            stream.close()
            async with asyncio.timeout(5):
                await seen.wait()

    run(main())


def test_only_known_fields_are_sent() -> None:
    """The request carries the key and the allow-list, and no other field."""
    seen: list[tuple[bytes, bytes]] = []

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await _read_request(reader))
        writer.write(_STREAM_HEAD + _chunk(_LAST) + b"0\r\n\r\n")

    _outcome(script)
    head, body = seen[0]
    assert head.startswith(b"POST /completion HTTP/1.1\r\n")
    assert b"Authorization: Bearer key\r\n" in head
    assert set(msgspec.json.decode(body)) == {
        *("prompt", "n_predict", "seed", "id_slot", "cache_prompt", "stop", "stream", "return_progress"),
        *("temperature", "top_k", "top_p", "min_p", "repeat_penalty", "samplers", "response_fields", "grammar"),
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"max_tokens": 0}, {"max_tokens": 2**31}, {"slot": -1}, {"slot": 1}, {"temperature": -0.1}, {"top_k": -1},
        {"temperature": float("nan")}, {"top_p": 1.1}, {"min_p": -1.0}, {"repeat_penalty": 0.0}, {"stop": ("",)},
        {"stop": ("x",) * 65}, {"seed": -1},
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_not_sent(changes: dict[str, object]) -> None:
    """Negative and absurd values have been memory errors upstream."""
    with pytest.raises(JobRefused, match="out of range"):
        completion_body(a_job(**changes), slots=1)


def test_a_lone_surrogate_is_refused() -> None:
    """Text that is not valid Unicode cannot be sent; that is the job's fault."""

    async def main() -> None:
        async with a_client(_sends()) as client:
            with pytest.raises(JobRefused, match="surrogate"):
                await client.count_tokens("\ud800")

    run(main())


def test_nobody_listening_is_a_lost_worker(tmp_path: Path) -> None:
    """A socket that is not there is WorkerLost, not an OSError."""
    with pytest.raises(WorkerLost):
        run(LlamaClient(tmp_path / "none", "key").props())


_TOKENS = b'{"tokens":[1,2,3]}'
_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(_TOKENS), _TOKENS)


@pytest.mark.parametrize("answers", [1, 3, 100])
def test_a_connection_is_used_again_until_the_worker_closes_it(answers: int) -> None:
    """A worker may close an idle connection whenever it likes: the next request has one of its own, and no error."""
    connections = 0

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        for _ in range(answers):
            await _read_request(reader)
            writer.write(_ANSWER)

    async def main() -> None:
        async with a_client(script) as client:
            for _ in range(6):
                assert await client.count_tokens("a b") == 3
                await asyncio.sleep(0)

    run(main())
    assert connections == -(-6 // answers)


def test_an_answer_that_closes_is_not_followed_by_another_request() -> None:
    """`Connection: close` is believed."""
    connections = 0

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await _read_request(reader)
        writer.write(_ANSWER.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
        await reader.read()

    async def main() -> None:
        async with a_client(script) as client:
            assert [await client.count_tokens("a") for _ in range(2)] == [3, 3]

    run(main())
    assert connections == 2
