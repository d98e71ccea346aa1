"""The tool fetch: text in the charset that it names, unpacked within bounds, everything else refused in our words."""

from __future__ import annotations

import asyncio
import gzip
import tracemalloc
import zlib
from typing import Any

import pytest

from llama_orch.contract.models import FetchRequest, FetchResult
from llama_orch.errors import PolicyDenied, ReplicaExhausted, UpstreamFailed
from llama_orch.runtime.fetching import AT_ONCE_MAX, Fetching
from tests.outbound.stand_in import Machine, a_door, a_machine, ok, redirect
from tests.outbound.test_door import on_sockets

pytestmark = pytest.mark.spec("HP-SEC-4")


async def fetch(machine: Machine, answer: Any, **request: Any) -> FetchResult:
    machine.answers["/x"] = answer
    return await Fetching(a_door().outbound).fetch(FetchRequest(url=f"{machine.url}/x", **request))


def typed(body: bytes, content_type: str, *headers: str) -> bytes:
    return ok(body, f"Content-Type: {content_type}", *headers)


@on_sockets
async def test_a_text_with_where_it_came_from() -> None:
    """Status, headers without cookies, text, final URL and the audit id of the log."""
    async with a_machine({"/a": redirect("/b")}) as machine:
        machine.answers["/b"] = ok(
            b"not here", "Content-Type: text/html", "Set-Cookie: a=b", "X-Y: 1", "X-Y: 2", status="404 Not Found"
        )
        door = a_door()
        result = await Fetching(door.outbound).fetch(FetchRequest(url=f"{machine.url}/a"))
        assert (result.status, result.text, result.url) == (404, "not here", f"{machine.url}/b")
        assert result.headers == {"content-length": "8", "content-type": "text/html", "x-y": "1, 2"}
        assert {one.audit_id for one in door.decisions} == {result.audit_id}
        assert {one.purpose for one in door.decisions} == {"tool"}


@on_sockets
@pytest.mark.parametrize(
    ("body", "content_type", "text"),
    [
        ("ä€".encode(), "text/plain", "ä€"),
        ("ä€".encode(), "text/plain; charset=utf-8", "ä€"),
        ("ä".encode("latin-1"), "text/plain; charset=ISO-8859-1", "ä"),
        ("€".encode("cp1252"), 'text/html; charset="windows-1252"', "€"),
        ("日本".encode("shift_jis"), "text/html;charset=Shift_JIS", "日本"),
        ("日本".encode("euc_jp"), "text/html; charset=euc-jp", "日本"),
        ("日本".encode("iso2022_jp"), "text/html; charset=iso-2022-jp", "日本"),
        ("Ж".encode("koi8_r"), "text/plain; charset=koi8-r", "Ж"),
        ("ä".encode("utf-16"), "text/plain", "ä"),
        ("ä".encode("utf-16-be"), "text/plain; charset=utf-16be", "ä"),
        (b"\xef\xbb\xbfx", "text/plain; charset=latin-1", "x"),
        (b"a\xffb", "text/plain", "a\ufffdb"),
        (b"\xed\xa0\x80", "text/plain", "\ufffd\ufffd\ufffd"),
        (b"\\u0041", "text/plain; charset=unicode_escape", "\\u0041"),
        (b"+AGE-", "text/plain; charset=utf-7", "+AGE-"),
        (b"6162", "text/plain; charset=hex", "6162"),
        (b"xn--a", "text/plain; charset=idna", "xn--a"),
        (b"x", "text/plain; charset=undefined", "x"),
        (b"x", "text/plain; charset=nonsense-9", "x"),
        (b'{"a":1}', "application/json", '{"a":1}'),
        (b"{}", "application/ld+json; charset=utf-8", "{}"),
        (b"<a/>", "application/atom+xml", "<a/>"),
        (b"", "image/png", ""),
    ],
)
async def test_texts_and_their_charsets(body: bytes, content_type: str, text: str) -> None:
    """Encodings of scripts are read; codecs that do something else are not, whatever the answer names."""
    async with a_machine() as machine:
        assert (await fetch(machine, typed(body, content_type))).text == text


@on_sockets
@pytest.mark.parametrize(
    "answer",
    [
        typed(b"\x89PNG", "image/png"),
        typed(b"x", "application/octet-stream"),
        typed(b"x", "application/x-gguf"),
        typed(b"x", "nonsense"),
        ok(b"a\0b"),
    ],
)
async def test_what_is_no_text_is_not_fetched(answer: bytes) -> None:
    """502 with the type that it has, and the audit id."""
    async with a_machine() as machine:
        with pytest.raises(UpstreamFailed, match="only text") as caught:
            await fetch(machine, answer)
        assert caught.value.details is not None
        assert caught.value.details["audit_id"]


@on_sockets
@pytest.mark.parametrize("pack", [gzip.compress, zlib.compress])
async def test_packed_texts_are_unpacked(pack: Any) -> None:
    """gzip and deflate, though neither was asked for."""
    encoding = "gzip" if pack is gzip.compress else "deflate"
    async with a_machine() as machine:
        result = await fetch(machine, typed(pack(b"hello" * 100), "text/plain", f"Content-Encoding: {encoding}"))
        assert result.text == "hello" * 100
        assert machine.headers()["accept-encoding"] == "identity"


@on_sockets
@pytest.mark.parametrize(
    ("body", "encoding", "says"),
    [
        (gzip.compress(b"\0" * 50_000_000), "gzip", "more than 100000 bytes once they are unpacked"),
        (gzip.compress(b"x" * 100_001), "gzip", "more than 100000 bytes"),
        (gzip.compress(b"hello")[:-4], "gzip", "to its end"),
        (gzip.compress(b"hello") + b"more", "gzip", "to its end"),
        (b"hello", "gzip", "cannot be unpacked"),
        (b"hello", "br", "'br', which was not asked for"),
        (b"hello", "gzip, gzip", "not asked for"),
    ],
)
async def test_bodies_that_cannot_be_unpacked(body: bytes, encoding: str, says: str) -> None:
    """A bomb is not blown up, damage is not passed over."""
    async with a_machine() as machine:
        answer = typed(body, "text/plain", f"Content-Encoding: {encoding}")
        with pytest.raises(UpstreamFailed, match=says):
            await fetch(machine, answer, max_bytes=100_000)


@on_sockets
async def test_a_bomb_takes_no_room() -> None:
    """What is unpacked is bounded while it is unpacked, and not looked at afterwards."""
    bomb = typed(gzip.compress(b"\0" * 50_000_000), "text/plain", "Content-Encoding: gzip")
    async with a_machine() as machine:
        tracemalloc.start()
        try:
            with pytest.raises(UpstreamFailed):
                await fetch(machine, bomb, max_bytes=100_000)
            _, peak_bytes = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak_bytes < 10_000_000


@on_sockets
async def test_the_bounds_are_the_callers() -> None:
    """As many bytes as asked for are read, one more is too much; the time is for all of it."""

    async def silent(writer: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    async with a_machine() as machine:
        assert (await fetch(machine, ok(b"x" * 10), max_bytes=10)).text == "x" * 10
        with pytest.raises(UpstreamFailed, match="more than 10 bytes"):
            await fetch(machine, ok(b"x" * 11), max_bytes=10)
        with pytest.raises(UpstreamFailed, match=r"longer than 0\.2 s"):
            await fetch(machine, silent, timeout_ms=200)


@on_sockets
async def test_a_denied_fetch() -> None:
    """POLICY_DENIED with the rule, and nothing else happens."""
    with pytest.raises(PolicyDenied) as caught:
        await Fetching(a_door().outbound).fetch(FetchRequest(url="http://127.0.0.2/"))
    assert caught.value.policy_label == "address"


@on_sockets
async def test_only_so_many_at_once() -> None:
    """The next one is told to come again; when one ends, its place is free."""
    go_on, arrived = asyncio.Event(), asyncio.Semaphore(0)

    async def held(writer: asyncio.StreamWriter) -> None:
        arrived.release()
        await go_on.wait()
        writer.write(ok())
        await writer.drain()

    async with a_machine({"/x": held}) as machine:
        fetching = Fetching(a_door().outbound)
        request = FetchRequest(url=f"{machine.url}/x")
        running = [asyncio.create_task(fetching.fetch(request)) for _ in range(AT_ONCE_MAX)]
        for _ in running:
            await arrived.acquire()
        with pytest.raises(ReplicaExhausted) as caught:
            await fetching.fetch(request)
        assert caught.value.retry_after_ms is not None
        with pytest.raises(ReplicaExhausted):
            await fetching.check(request.url)
        go_on.set()
        assert {result.text for result in await asyncio.gather(*running)} == {"hello"}
        assert (await fetching.fetch(request)).text == "hello"
        assert (await fetching.check(request.url)).allowed
