"""Both clients behind one face, and a service over real HTTP."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, cast

import pytest

from llama_orch.client import AsyncClient, Client
from tests.cli.contract_service import ContractService

NewClient = Callable[..., Client]


class Blocking:
    """An AsyncClient that is used like a Client: a loop of its own runs each call to its end."""

    def __init__(self, client: AsyncClient, runner: asyncio.Runner) -> None:
        self._client = client
        self._runner = runner

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._client, name)
        if not callable(value):
            return value

        def call(*args: Any, **kwargs: Any) -> Any:
            result = value(*args, **kwargs)
            return self._items(result) if hasattr(result, "__anext__") else self._runner.run(result)

        return call

    def _items(self, items: Any) -> Iterator[Any]:
        async def step(stream: AsyncIterator[Any]) -> list[Any]:
            return [item async for item in _first(stream)]

        try:
            while found := self._runner.run(step(items)):
                yield from found
        finally:
            self._runner.run(items.aclose())


async def _first(stream: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for item in stream:
        yield item
        return


@pytest.fixture
def service() -> Iterator[ContractService]:
    with ContractService() as service:
        yield service


@pytest.fixture
def closed_url() -> Iterator[str]:
    """An address where connections are refused: bound, so that nobody else takes it, and not listening."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{holder.getsockname()[1]}"


@pytest.fixture
def waits() -> list[float]:
    """What the client slept, in seconds."""
    return []


@pytest.fixture(params=["sync", "async"])
def new_client(request: pytest.FixtureRequest, waits: list[float]) -> Iterator[NewClient]:
    """Makes clients of either kind that wait exactly as long as they are asked, in no time."""

    async def pause(seconds: float) -> None:
        waits.append(seconds)

    with asyncio.Runner() as runner:
        made: list[Any] = []

        def new(url: str, token: str, **options: Any) -> Client:
            options.setdefault("dice", lambda: 0.0)
            if request.param == "sync":
                client: Any = Client(url, token, sleep=waits.append, **options)
            else:
                client = Blocking(AsyncClient(url, token, sleep=pause, **options), runner)
            made.append(client)
            return cast(Client, client)

        yield new
        for client in made:
            client.close()


@pytest.fixture
def client(service: ContractService, new_client: NewClient) -> Client:
    return new_client(service.url, service.token)
