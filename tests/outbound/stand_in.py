"""Other machines, played on loopback: servers that say exactly the bytes they are told, and a name server that can
change its mind."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from llama_orch.contract.config import OutboundSettings
from llama_orch.outbound.decision import Decision
from llama_orch.outbound.door import Outbound
from llama_orch.outbound.plugins import Plugins
from llama_orch.outbound.resolving import ResolveError
from llama_orch.policy.addresses import Address
from llama_orch.policy.rules import Rules

CERTIFICATE = Path(__file__).with_name("files.example.pem")  # for that name, and its key; it protects nothing
LIMIT_S = 20.0  # a test that hangs fails

Answer = bytes | Callable[[asyncio.StreamWriter], Awaitable[None]]


def ok(body: bytes = b"hello", *headers: str, status: str = "200 OK") -> bytes:
    head = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*head, "", ""]).encode() + body


def redirect(location: str, status: int = 302) -> bytes:
    return ok(b"", f"Location: {location}", status=f"{status} Elsewhere")


@dataclass
class Names:
    """Host to what it stands for, one list for each time that it is asked for; the last one stays."""

    known: dict[str, list[list[str]]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    async def resolve(self, host: str) -> list[Address]:
        self.asked.append(host)
        lists = self.known.get(host, [[]])
        addresses = lists.pop(0) if len(lists) > 1 else lists[0]
        if addresses == ["?"]:
            raise ResolveError("no name server answered")
        return [ip_address(one) for one in addresses]


@dataclass
class Machine:
    """A server on loopback. `answers`: what it says to a path; `heard`: what it was asked, head by head."""

    port: int
    answers: dict[str, Answer] = field(default_factory=dict)
    heard: list[str] = field(default_factory=list)
    names: list[str | None] = field(default_factory=list)  # that TLS was asked for

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def headers(self, index: int = -1) -> dict[str, str]:
        lines = self.heard[index].split("\r\n")[1:-2]
        return {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            self.heard.append(head)
            answer = self.answers.get(head.split(" ")[1], ok(b"", status="404 Not Found"))
            if isinstance(answer, bytes):
                writer.write(answer)
                await writer.drain()
            else:
                await answer(writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            return  # the caller has gone, as many tests want it to
        finally:
            writer.close()


@asynccontextmanager
async def a_machine(answers: dict[str, Answer] | None = None, *, tls: bool = False) -> AsyncIterator[Machine]:
    machine = Machine(0, answers or {})
    context = None
    if tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(CERTIFICATE)
        context.sni_callback = lambda _socket, name, _context: machine.names.append(name)  # type: ignore[assignment]
    server = await asyncio.start_server(machine.serve, "127.0.0.1", 0, ssl=context)
    machine.port = server.sockets[0].getsockname()[1]
    try:
        yield machine
    finally:
        server.close()


@dataclass
class Door:
    outbound: Outbound
    names: Names
    decisions: list[Decision]

    @property
    def rules(self) -> list[str]:
        """Of the decisions so far."""
        return [one.rule for one in self.decisions]


def a_door(names: dict[str, list[list[str]]] | None = None, *, plugins: Plugins | None = None, **settings: Any) -> Door:
    """Loopback's 127.0.0.1 stands for a public machine, unless `allow` says otherwise."""
    decisions: list[Decision] = []
    known = Names(names or {})
    rules = Rules.of(OutboundSettings(**{"allow": ["127.0.0.1"], **settings}))
    trusting = ssl.create_default_context(cafile=str(CERTIFICATE))
    outbound = Outbound(rules, decisions.append, plugins=plugins, resolve=known.resolve, tls=trusting)
    return Door(outbound, known, decisions)


def play(act: Awaitable[None]) -> None:
    """Run a test on real sockets."""

    async def limited() -> None:
        async with asyncio.timeout(LIMIT_S):
            await act

    asyncio.run(limited())
