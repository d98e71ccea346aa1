"""The door on real sockets: pinned to what was judged, whatever names, redirects and bodies try."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from llama_orch.errors import PolicyDenied, UpstreamFailed
from llama_orch.outbound.door import Limits, Reply
from tests.outbound.stand_in import Door, a_door, a_machine, ok, play, redirect

pytestmark = [pytest.mark.spec("HP-SEC-4"), pytest.mark.attack(6)]
LIMITS = Limits(bytes_max=10_000, total_s=15.0)
NOWHERE = "127.0.0.9"  # loopback, and not the stand-in for a public machine


def on_sockets(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    @functools.wraps(test)
    def played(*args: Any, **kwargs: Any) -> None:
        play(test(*args, **kwargs))

    return played


async def got(door: Door, url: str, limits: Limits = LIMITS, **more: Any) -> tuple[Reply, bytes]:
    async with door.outbound.fetch(url, purpose="tool", limits=limits, **more) as reply:
        return reply, b"".join([chunk async for chunk in reply.chunks()])


async def denied(door: Door, url: str, **more: Any) -> PolicyDenied:
    with pytest.raises(PolicyDenied) as caught:
        await got(door, url, **more)
    assert caught.value.details == {"audit_id": door.decisions[-1].audit_id}
    assert caught.value.policy_label == door.decisions[-1].rule
    return caught.value


async def failed(door: Door, url: str, limits: Limits = LIMITS) -> str:
    with pytest.raises(UpstreamFailed) as caught:
        await got(door, url, limits)
    assert caught.value.details == {"audit_id": door.decisions[-1].audit_id}
    return caught.value.message


@on_sockets
async def test_an_allowed_request_is_made_and_recorded() -> None:
    """A plain GET with the Host that was asked for; one decision, and its audit id on the reply."""
    async with a_machine({"/a?b=c": ok(b"hello", "X-Y: z")}) as machine:
        door = a_door({"files.example": [["127.0.0.1"]]})
        reply, body = await got(door, f"http://files.example:{machine.port}/a?b=c#d")
        assert (reply.http_status, body, reply.headers["x-y"]) == (200, b"hello", "z")
        assert machine.headers() == {
            "host": f"files.example:{machine.port}",
            "user-agent": "llama-orch",
            "accept": "*/*",
            "accept-encoding": "identity",
            "connection": "close",
        }
        (decision,) = door.decisions
        assert (decision.is_allowed, decision.rule, decision.purpose) == (True, "allow[0]", "tool")
        assert reply.audit_id == decision.audit_id
        assert [str(one) for one in decision.addresses] == ["127.0.0.1"]


@on_sockets
async def test_a_name_is_looked_up_once() -> None:
    """DNS rebinding: the second answer, which is private, is never asked for within a request, and denies the next."""
    async with a_machine({"/": ok()}) as machine:
        door = a_door({"rebinding.example": [["127.0.0.1"], [NOWHERE]]})
        url = f"http://rebinding.example:{machine.port}/"
        await got(door, url)
        assert door.names.asked == ["rebinding.example"]
        assert (await denied(door, url)).policy_label == "address"
        assert len(machine.heard) == 1


@on_sockets
async def test_rebinding_on_the_way_of_a_redirect() -> None:
    """A redirect to the same host is a request of its own: its name is looked up, and judged, anew."""
    async with a_machine({"/": redirect("/again"), "/again": ok()}) as machine:
        door = a_door({"rebinding.example": [["127.0.0.1"], ["169.254.169.254"]]})
        await denied(door, f"http://rebinding.example:{machine.port}/")
        assert door.rules == ["allow[0]", "address"]
        assert len({one.audit_id for one in door.decisions}) == 1
        assert len(machine.heard) == 1


@on_sockets
async def test_one_private_address_of_several_denies() -> None:
    """Wherever it stands in the list; nothing is connected to."""
    async with a_machine({"/": ok()}) as machine:
        for addresses in (
            ["127.0.0.1", NOWHERE],
            [NOWHERE, "127.0.0.1"],
            ["127.0.0.1", "::1"],
            ["127.0.0.1", "fe80::1"],
        ):
            await denied(a_door({"several.example": [addresses]}), f"http://several.example:{machine.port}/")
        assert machine.heard == []


@on_sockets
async def test_the_next_address_is_tried() -> None:
    """Where the first one takes no connection; all of them were judged."""
    async with a_machine({"/": ok()}) as machine:
        door = a_door({"two.example": [[NOWHERE, "127.0.0.1"]]}, allow=["127.0.0.0/8"])
        _, body = await got(door, f"http://two.example:{machine.port}/")
        assert body == b"hello"
        assert len(door.decisions) == 1


@on_sockets
async def test_a_list_denies_without_asking_a_name_server() -> None:
    """A name can carry what is in it to whoever answers for it."""
    door = a_door(deny=["*.evil.example"])
    await denied(door, "http://secret-in-a-name.evil.example/")
    assert door.names.asked == []


@on_sockets
async def test_a_list_of_networks_decides_once_the_name_was_looked_up() -> None:
    """A name that stands for a denied address is denied; with `default: deny` one that stands for an allowed address
    is served, and one that does not is not."""
    async with a_machine({"/": ok()}) as machine:
        names = {"here.example": [["127.0.0.1"]], "there.example": [["9.9.9.9"]]}
        url = f"http://here.example:{machine.port}/"
        assert (await denied(a_door(names, deny=["127.0.0.0/8"]), url)).policy_label == "deny[0]"
        only = a_door(names, default="deny", allow=["127.0.0.1"])
        await got(only, url)
        assert (await denied(only, "http://there.example/")).policy_label == "default"
        assert only.names.asked == ["here.example", "there.example"]


@on_sockets
async def test_nothing_to_connect_to_is_a_failure_and_not_a_denial() -> None:
    """No address, and no answer of a name server."""
    door = a_door({"silent.example": [["?"]]})
    assert "has no address" in await failed(door, "http://none.example/")
    assert "no name server answered" in await failed(door, "http://silent.example/")
    assert all(one.is_allowed for one in door.decisions)
    assert (await door.outbound.check("http://silent.example/")).addresses == ()


@on_sockets
async def test_a_check_requests_nothing() -> None:
    """The same decision, with purpose `check`, and no connection."""
    async with a_machine({"/": ok()}) as machine:
        door = a_door({"files.example": [["127.0.0.1"]]})
        decision = await door.outbound.check(f"http://files.example:{machine.port}/")
        assert (decision.is_allowed, decision.purpose) == (True, "check")
        assert not (await door.outbound.check("http://127.0.0.2/")).is_allowed
        assert not (await door.outbound.check("no URL")).is_allowed
        assert len(door.decisions) == 3
        assert machine.heard == []


@on_sockets
async def test_redirects_are_followed_and_judged() -> None:
    """Each of the five statuses, relative and absolute; every one is a decision of the same audit id."""
    answers: dict[str, Any] = {f"/{status}": redirect("end", status) for status in (301, 302, 303, 307, 308)}
    async with a_machine({**answers, "/end": ok(b"here")}) as machine:
        for path in answers:
            door = a_door()
            reply, body = await got(door, machine.url + path)
            assert (body, reply.target.url) == (b"here", f"{machine.url}/end")
            assert [one.audit_id for one in door.decisions] == [reply.audit_id] * 2


@on_sockets
@pytest.mark.parametrize(
    ("location", "rule"),
    [
        ("http://127.0.0.2/", "address"),
        ("http://[::1]/", "address"),
        ("http://169.254.169.254/latest/meta-data/", "address"),
        ("http://denied.example/", "deny[0]"),
        ("//denied.example/", "deny[0]"),
        ("ftp://127.0.0.1/", "scheme"),
        ("file:///etc/passwd", "scheme"),
        ("http://0x7f000001/", "invalid-url"),
        ("http://user:password@127.0.0.1/", "invalid-url"),
    ],
)
async def test_a_redirect_to_where_one_may_not_go(location: str, rule: str) -> None:
    """It is denied as the same URL would be at first."""
    async with a_machine({"/": redirect(location)}) as machine:
        error = await denied(a_door(deny=["denied.example"]), machine.url)
        assert error.policy_label == rule


@on_sockets
async def test_a_redirect_that_never_ends() -> None:
    """A loop, and a chain that is too long, end after five; one of five is followed."""
    answers = {f"/{number}": redirect(f"/{number - 1}") for number in range(1, 9)}
    async with a_machine({"/": redirect("/"), "/0": ok(b"end"), **answers}) as machine:
        assert "more than 5 times" in await failed(a_door(), machine.url)
        assert len(machine.heard) == 6
        assert "more than 5 times" in await failed(a_door(), f"{machine.url}/6")
        assert (await got(a_door(), f"{machine.url}/5"))[1] == b"end"


@on_sockets
async def test_secrets_go_to_the_origin_that_was_named_alone() -> None:
    """Authorization, cookies and unknown headers are dropped at another host or port, and are there again at the
    first; what is harmless, such as Range, goes along."""
    async with a_machine() as one, a_machine() as other:
        one.answers = {"/": redirect(f"http://127.0.0.1:{other.port}/there"), "/back": ok()}
        other.answers = {"/there": redirect(f"{one.url}/back")}
        secrets = {"Authorization": "Bearer s", "Cookie": "a=b", "X-Api-Key": "k", "Proxy-Authorization": "p"}
        await got(a_door(), one.url, headers={**secrets, "Range": "bytes=5-", "Accept": "x/y", "Host": "evil.example"})
        names = {name.lower() for name in secrets}
        assert names <= one.headers(0).keys()
        assert names.isdisjoint(other.headers())
        assert (other.headers()["range"], other.headers()["accept"]) == ("bytes=5-", "x/y")
        assert names <= one.headers(1).keys()
        assert one.headers(0)["host"] == f"127.0.0.1:{one.port}"


@on_sockets
async def test_cookies_are_not_kept() -> None:
    """Neither between requests nor along a redirect."""
    setting = ok(b"", "Location: /b", "Set-Cookie: a=b; Path=/", status="302 Found")
    async with a_machine({"/a": setting, "/b": ok()}) as machine:
        door = a_door()
        await got(door, f"{machine.url}/a")
        await got(door, f"{machine.url}/b")
        assert all("cookie" not in machine.headers(index) for index in range(3))


@on_sockets
async def test_tls_is_for_the_name_and_the_connection_for_the_address() -> None:
    """The name is in SNI and Host, and the certificate must be for it: the same machine by another name is refused."""
    async with a_machine({"/": ok()}, tls=True) as machine:
        names = {"files.example": [["127.0.0.1"]], "other.example": [["127.0.0.1"]]}
        _, body = await got(a_door(names), f"https://files.example:{machine.port}/")
        assert body == b"hello"
        assert machine.names == ["files.example"]
        assert machine.headers()["host"] == f"files.example:{machine.port}"
        assert "certificate" in await failed(a_door(names), f"https://other.example:{machine.port}/")
        assert "certificate" in await failed(a_door(names), f"https://127.0.0.1:{machine.port}/")
        assert len(machine.heard) == 1


@on_sockets
async def test_a_redirect_gives_up_no_tls() -> None:
    """From https to http is denied, even to the same machine; from http to https is not."""
    async with a_machine({"/": ok()}) as plain, a_machine(tls=True) as secure:
        secure.answers = {"/": redirect(plain.url), "/end": ok(b"end")}
        plain.answers["/up"] = redirect(f"https://files.example:{secure.port}/end")
        names = {"files.example": [["127.0.0.1"]]}
        assert (await denied(a_door(names), f"https://files.example:{secure.port}/")).policy_label == "downgrade"
        assert plain.heard == []
        assert (await got(a_door(names), f"{plain.url}/up"))[1] == b"end"


@on_sockets
async def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy would look the name up itself, and connect where it likes."""
    async with a_machine({"/": ok()}) as machine, a_machine() as proxy:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        await got(a_door(), machine.url)
        assert (len(machine.heard), proxy.heard) == (1, [])


@on_sockets
async def test_ranges_and_heads() -> None:
    """As a download asks for what it lacks: 206 is an answer, HEAD has no body, and so is 404 an answer."""
    part = ok(b"lo", "Content-Range: bytes 3-4/5", status="206 Partial Content")
    async with a_machine({"/part": part, "/head": b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n"}) as machine:
        reply, body = await got(a_door(), f"{machine.url}/part", headers={"Range": "bytes=3-"})
        assert (reply.http_status, body, reply.headers["content-range"]) == (206, b"lo", "bytes 3-4/5")
        reply, body = await got(a_door(), f"{machine.url}/head", method="HEAD")
        assert (reply.headers["content-length"], body) == ("99999999", b"")
        assert (await got(a_door(), f"{machine.url}/none"))[0].http_status == 404


# -- machines that do not behave -------------------------------------------------------------------------------------


async def endless(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
    while not writer.is_closing():
        writer.write(b"x" * 4096)
        await writer.drain()


async def endless_chunks(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while not writer.is_closing():
        writer.write(b"1000\r\n" + b"x" * 4096 + b"\r\n")
        await writer.drain()


async def endless_head(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n")
    while not writer.is_closing():
        writer.write(b"X-Y: " + b"z" * 4096 + b"\r\n")
        await writer.drain()


async def endless_hints(writer: asyncio.StreamWriter) -> None:
    while not writer.is_closing():
        writer.write(b"HTTP/1.1 103 Early Hints\r\n\r\n")
        await writer.drain()


async def silent(writer: asyncio.StreamWriter) -> None:
    await asyncio.Event().wait()


async def silent_after_the_head(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhe")
    await writer.drain()
    await asyncio.Event().wait()


async def dripping(writer: asyncio.StreamWriter) -> None:
    """Always a byte before anybody loses patience."""
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n")
    pause = asyncio.Event()
    while not writer.is_closing():
        writer.write(b"x")
        await writer.drain()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(pause.wait(), 0.05)


@on_sockets
@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (ok(b"x" * 10_001), "more than 10000 bytes"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999\r\n\r\nx", "more than 10000 bytes"),
        (endless, "more than 10000 bytes"),
        (endless_chunks, "more than 10000 bytes"),
        (endless_head, "not HTTP, or breaks off"),
        (endless_hints, "did not answer in time"),
        (silent, "did not answer in time"),
        (silent_after_the_head, "did not answer in time"),
        (dripping, "took longer than 3 s"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhe", "not HTTP, or breaks off"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!", "not HTTP, or breaks off"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nhello", "not HTTP, or breaks off"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nhello", "not HTTP, or breaks off"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhe", "not HTTP, or breaks off"),
        (b"HTTP/1.1 999999 OK\r\n\r\n", "not HTTP, or breaks off"),
        (b"SSH-2.0-OpenSSH_9.7\r\n", "not HTTP, or breaks off"),
        (b"\x00" * 500, "not HTTP, or breaks off"),
        (b"", "not HTTP, or breaks off"),
    ],
)
async def test_a_machine_that_does_not_behave(answer: Any, says: str) -> None:
    """It fails as UPSTREAM_FAILED in our words, within the limits of bytes and time."""
    async with a_machine({"/": answer}) as machine:
        limits = Limits(bytes_max=10_000, total_s=3.0, idle_s=0.3, answer_s=0.6)
        with pytest.raises(UpstreamFailed, match=says):
            await got(a_door(), machine.url, limits)


@on_sockets
async def test_a_body_without_a_length_ends_with_the_connection() -> None:
    """As HTTP/1.0 does; there is no more to check it by."""
    async with a_machine({"/": b"HTTP/1.0 200 OK\r\n\r\nhello"}) as machine:
        assert (await got(a_door(), machine.url))[1] == b"hello"


@on_sockets
async def test_nobody_listens() -> None:
    """A refused connection says so."""
    async with a_machine() as machine:
        url = machine.url
    assert "refuses connections" in await failed(a_door(), url)


@on_sockets
async def test_the_callers_own_failure_stays_its_own() -> None:
    """What is raised within the block, a time-out of the caller's included, comes out as it is."""
    async with a_machine({"/": ok()}) as machine:
        for error in (OSError(28, "No space left"), TimeoutError("mine"), KeyError("x")):
            with pytest.raises(type(error)) as caught:
                async with a_door().outbound.fetch(machine.url, purpose="model", limits=LIMITS):
                    raise error
            assert caught.value is error
