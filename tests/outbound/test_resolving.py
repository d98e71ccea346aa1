"""Names to addresses as this machine has them: what has none is told from what cannot be asked."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from llama_orch.outbound import resolving
from llama_orch.outbound.resolving import ResolveError, system_resolve
from llama_orch.policy.addresses import Kind, kinds

pytestmark = pytest.mark.spec("HP-SEC-4")


def answering(monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
    """The system's resolver gives, or raises, this."""

    def getaddrinfo(*_: Any, **__: Any) -> Any:
        if isinstance(answer, BaseException):
            raise answer
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (text, 0)) for text in answer]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


def test_this_machine_is_known() -> None:
    """By the real resolver."""
    found = asyncio.run(system_resolve("localhost"))
    assert found
    assert all(kinds(address) == {Kind.LOOPBACK} for address in found)


def test_all_addresses_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each once, without a zone, and not endlessly many."""
    answering(monkeypatch, ["9.9.9.9", "fe80::1%eth0", "9.9.9.9", "1.1.1.1"])
    assert [str(one) for one in asyncio.run(system_resolve("x.example"))] == ["9.9.9.9", "fe80::1", "1.1.1.1"]
    answering(monkeypatch, [f"9.9.{high}.{low}" for high in range(9) for low in range(200)])
    assert len(asyncio.run(system_resolve("x.example"))) == resolving.ADDRESSES_MAX


@pytest.mark.parametrize("code", [socket.EAI_NONAME, socket.EAI_NODATA])
def test_a_name_without_an_address(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """It has none: that is an answer."""
    answering(monkeypatch, socket.gaierror(code, "none"))
    assert asyncio.run(system_resolve("x.example")) == []


@pytest.mark.parametrize("error", [socket.gaierror(socket.EAI_AGAIN, "again"), OSError(24, "files"), UnicodeError("x")])
def test_a_name_that_cannot_be_looked_up(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Nobody could say."""
    answering(monkeypatch, error)
    with pytest.raises(ResolveError):
        asyncio.run(system_resolve("x.example"))


def test_a_name_server_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is waited for, but not for ever."""
    monkeypatch.setattr(resolving, "RESOLVE_LIMIT_S", 0.05)

    async def act() -> None:
        loop = asyncio.get_running_loop()

        async def silent(*_: Any, **__: Any) -> Any:
            await asyncio.Event().wait()

        monkeypatch.setattr(loop, "getaddrinfo", silent)
        with pytest.raises(ResolveError, match="no name server answered within"):
            await system_resolve("x.example")

    asyncio.run(act())
