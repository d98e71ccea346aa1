"""Servers that break, lie or mean harm: each has one typed end, and none takes more than a bounded time and memory."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from llama_orch.engines.base import JobRefused, ReadJob, RunLost, RunStalled, WorkerLost
from llama_orch.engines.remote.client import retry_after_s
from llama_orch.engines.remote.worker import RETRY_PAUSES_S
from tests.engines.remote.support import KEY, a_key_file, attached
from tests.engines.remote.upstream import (
    DONE,
    STREAM_HEAD,
    data,
    delta,
    fails,
    models,
    says,
    streams,
    tells,
    usual,
)
from tests.engines.support import a_job, collect, run, text_of

TRIES = 1 + len(RETRY_PAUSES_S)
PATH = "/v1/completions"

# Whatever of this comes first is tried again.
BROKEN: dict[str, bytes] = {
    "nothing": b"",
    "a head without a body": STREAM_HEAD,
    "no end": streams(data({"choices": []})),
    "500": fails(500),
    "502 without JSON": says(b"<html>", status="502 Bad Gateway", kind="text/html"),
    "a page": says(b"<html>", kind="text/html"),
    "not a stream": says({"choices": [{"text": "a"}]}),
    "no JSON": streams(data(b"{")),
    "deep JSON": streams(data(b"[" * 100_000)),
    "not UTF-8": streams(data(b'{"choices":[{"text":"\xff"}]}')),
    "a lone surrogate": streams(data(b'{"choices":[{"text":"\\ud800"}]}')),
    "of another type": streams(data({"choices": [{"text": 3}]})),
    "a long line": streams(b"data: " + b"x" * (2 << 20)),
    "a large head": b"HTTP/1.1 200 OK\r\nX: " + b"x" * (1 << 20) + b"\r\n\r\n",
    "many headers": b"HTTP/1.1 200 OK\r\n" + b"X: x\r\n" * 50_000 + b"\r\n",
    "another protocol": b"SSH-2.0\r\n\r\n",
    "a short body": b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 99\r\n\r\ndata: ",
    "an error within": streams(data({"error": {"message": "engine died", "code": 500}})),
    "an error as text": streams(data({"error": "engine died"})),
}


@pytest.mark.spec("HP-REM-4", "HP-REM-7")
@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_what_breaks_before_the_first_token_is_tried_again(broken: bytes) -> None:
    """And where it stays so, three times and no more. The server is looked at meanwhile."""

    async def main() -> None:
        async with attached(usual(completions=[broken, broken, tells("a")])) as (worker, upstream):
            chunks, _ = await collect(worker, a_job())
            assert text_of(chunks) == "a"
            upstream.answers[PATH] = [broken]
            upstream.heard.clear()
            with pytest.raises(RunLost) as lost:
                await collect(worker, a_job())
            assert len(upstream.asked(PATH)) == TRIES
            assert str(lost.value).startswith("server box")
            assert len(str(lost.value)) < 500

    run(main())


@pytest.mark.spec("HP-REM-4", "HP-REM-7")
@pytest.mark.parametrize(
    "rest",
    [b"", data(b"{"), data({"error": {"message": "died"}}), b"data: " + b"x" * (2 << 20)],
    ids=["nothing", "no JSON", "an error", "a long line"],
)
def test_what_breaks_later_is_over(rest: bytes) -> None:
    """Its client has read a part of it."""

    async def main() -> None:
        async with attached(usual(completions=streams(delta("a"), rest))) as (worker, upstream):
            with pytest.raises(RunLost):
                await collect(worker, a_job())
            assert len(upstream.asked(PATH)) == 1

    run(main())


@pytest.mark.spec("HP-REM-7")
@pytest.mark.parametrize("part", [delta("x"), data({"choices": []})], ids=["tokens", "empty events"])
def test_a_stream_without_end(part: bytes) -> None:
    """More events than there can be tokens."""
    sent = [0]

    async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, heard: Any) -> None:
        writer.write(STREAM_HEAD)
        while not reader.at_eof():
            writer.write(part * 100)
            sent[0] += 100
            await writer.drain()
            await asyncio.wait([asyncio.ensure_future(reader.read(1))], timeout=0.001)

    async def main() -> None:
        async with attached(usual(completions=endless)) as (worker, _):
            with pytest.raises(RunLost, match="more than the 10 tokens"):
                await collect(worker, a_job(max_tokens=10))

    run(main())


async def _dribble(first: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, part: bytes) -> None:
    writer.write(first)
    while not reader.at_eof():
        writer.write(part)
        await writer.drain()
        with suppress(TimeoutError):
            async with asyncio.timeout(0.02):
                await reader.read(1)


@pytest.mark.spec("HP-REM-4", "HP-REM-7")
@pytest.mark.parametrize(
    ("first", "part"),
    [
        (b"", b"H"),
        (STREAM_HEAD, b": comment\n"),
        (STREAM_HEAD, b"x"),
        (STREAM_HEAD + delta("a"), b": hi\n"),
        (b"", b""),
    ],
    ids=["head", "comments", "line", "after a token", "silence"],
)
def test_what_comes_without_a_token_is_no_sign_of_life(first: bytes, part: bytes) -> None:
    """The time without a token is bounded, and is spent once only."""

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, heard: Any) -> None:
        await _dribble(first, reader, writer, part)

    async def main() -> None:
        async with attached(usual(completions=slow)) as (worker, upstream):
            with pytest.raises(RunStalled):
                await collect(worker, a_job(idle_timeout_s=0.2))
            assert len(upstream.asked(PATH)) == 1

    run(main())


@pytest.mark.spec("HP-REM-4")
def test_a_text_that_is_not_read_in_time() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, heard: Any) -> None:
        await reader.read(1)

    async def main() -> None:
        async with attached(usual(embeddings=silent), workload="embedding") as (worker, upstream):
            with pytest.raises(RunStalled):
                await worker.read(ReadJob("text", 0, idle_timeout_s=0.1))
            assert len(upstream.asked("/v1/embeddings")) == 1

    run(main())


@pytest.mark.spec("HP-REM-2", "HP-REM-7")
@pytest.mark.parametrize("status", [400, 413, 422])
def test_the_jobs_own_fault(tmp_path: Path, status: int) -> None:
    """What the server says of it is passed on, short, in one line, and without the key."""
    message = f"context of 10 exceeded \x1b[31m\nwith {KEY} " + "x" * 100_000

    async def main() -> None:
        key = str(a_key_file(tmp_path))
        async with attached(usual(completions=fails(status, message)), api_key_file=key) as (worker, upstream):
            with pytest.raises(JobRefused) as refused:
                await collect(worker, a_job())
            said = str(refused.value)
            assert said.startswith(f"server box answers {status}: context of 10 exceeded")
            assert said.isprintable()
            assert KEY not in said
            assert "[redacted]" in said
            assert len(said) < 400
            assert len(upstream.asked(PATH)) == 1

    run(main())


@pytest.mark.spec("HP-REM-7")
@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"message": "m1"}, "m1"),
        ({"detail": "m2"}, "m2"),
        ({"error": "m3"}, "m3"),
        (b"m4", "m4"),
        ({"error": 5}, "nothing"),
    ],
)
def test_errors_in_the_shapes_of_others(body: object, said: str) -> None:
    async def main() -> None:
        async with attached(usual(completions=says(body, status="400 No"))) as (worker, _):
            with pytest.raises(JobRefused, match=f"answers 400: {said}"):
                await collect(worker, a_job())

    run(main())


@pytest.mark.spec("HP-REM-2", "HP-REM-3")
@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (fails(401, KEY), "refuses the key"),
        (fails(404), "answers 404"),
        (says(b"", "Location: http://127.0.0.1:1/", status="307 Go"), "redirects"),
    ],
    ids=["key", "model", "redirect"],
)
def test_what_costs_the_replica(tmp_path: Path, answer: bytes, reason: str) -> None:
    """The key is not sent to where a redirect leads, since nothing is."""

    async def main() -> None:
        async with attached(usual(completions=answer), api_key_file=str(a_key_file(tmp_path))) as (worker, _):
            with pytest.raises(WorkerLost, match=reason) as lost:
                await collect(worker, a_job())
            assert KEY not in str(lost.value)

    run(main())


@pytest.mark.spec("HP-REM-3")
def test_its_health_is_looked_after() -> None:
    """One bad look is none; two in a row are the end, and the reason is told."""

    async def main() -> None:
        answers = usual(health=[says({}), fails(500), says({}), fails(500), fails(500)])
        async with attached(answers, health_interval_ms=100) as (worker, upstream):
            assert "answers 500" in await worker.lost()
            assert len(upstream.asked("/health")) == 5

    run(main())


@pytest.mark.spec("HP-REM-3")
def test_a_server_without_health_is_asked_for_its_models() -> None:
    """One that is busy is well."""

    async def main() -> None:
        answers = {**usual(models=[models(), fails(429), fails(503), b"", b""]), "/health": [fails(404)]}
        async with attached(answers, health_interval_ms=100) as (worker, upstream):
            assert "server box is away" in await worker.lost()
            assert len(upstream.asked("/v1/models")) == 5

    run(main())


@pytest.mark.spec("HP-REM-3")
def test_a_broken_run_has_it_looked_at_at_once() -> None:
    async def main() -> None:
        answers = usual(completions=streams(delta("a")), health=[says({}), b""])
        async with attached(answers, health_interval_ms=3_600_000) as (worker, _):
            lost = asyncio.ensure_future(worker.lost())
            with pytest.raises(RunLost):
                await collect(worker, a_job())
            assert "away" in await lost

    run(main())


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("5", 5.0), ("0", 0.0), ("0.5", 0.5), ("999999", 60.0), ("", 1.0), ("-1", 1.0), ("nan", 1.0), ("9" * 30, 1.0)],
)
def test_retry_after(text: str, seconds: float) -> None:
    assert retry_after_s({"retry-after": text}) == seconds


def test_retry_after_as_a_date() -> None:
    assert retry_after_s({"retry-after": "Wed, 21 Oct 2026 07:28:00 GMT"}) == 1.0


def test_nothing_more_is_read_once_it_is_done() -> None:
    """What a server sends after [DONE] is nobody's."""

    async def main() -> None:
        async with attached(usual(completions=streams(delta("a", "stop"), DONE, delta("b"), b"x" * 100))) as (
            worker,
            _,
        ):
            chunks, _ = await collect(worker, a_job())
            assert text_of(chunks) == "a"

    run(main())
