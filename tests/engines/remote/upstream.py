"""A server of OpenAI's API that says exactly what a test tells it to, on loopback."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

MODEL = "org/model"


class Heard(NamedTuple):
    method: str
    path: str
    headers: dict[str, str]
    body: Any


Answer = bytes | Callable[[asyncio.StreamReader, asyncio.StreamWriter, Heard], Awaitable[None]]


def says(body: object, *headers: str, status: str = "200 OK", kind: str = "application/json") -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = [f"HTTP/1.1 {status}", f"Content-Type: {kind}", f"Content-Length: {len(data)}", *headers]
    return "\r\n".join([*head, "", ""]).encode() + data


def fails(status: int, message: str = "no", *headers: str) -> bytes:
    return says({"error": {"message": message}}, *headers, status=f"{status} No")


def models(owned_by: str = "somebody", model: str = MODEL, **more: Any) -> bytes:
    return says({"object": "list", "data": [{"id": model, "owned_by": owned_by, **more}]})


STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"  # ends with the connection


def data(event: object) -> bytes:
    return b"data: " + (event if isinstance(event, bytes) else json.dumps(event).encode()) + b"\n\n"


def delta(text: str, finish: str | None = None) -> bytes:
    return data({"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}]})


def usage(prompt: int, completion: int, cached: int = 0) -> bytes:
    details = {"cached_tokens": cached}
    told = {"prompt_tokens": prompt, "completion_tokens": completion, "prompt_tokens_details": details}
    return data({"choices": [], "usage": told})


DONE = data(b"[DONE]")


def streams(*parts: bytes) -> bytes:
    return STREAM_HEAD + b"".join(parts)


def tells(*texts: str) -> bytes:
    """A whole answer, a token each."""
    return streams(*map(delta, texts), delta("", "stop"), usage(7, len(texts)), DONE)


@dataclass
class Upstream:
    """`answers`: by path, taken one by one; the last one stays. `most`: requests of a path at one time."""

    port: int = 0
    answers: dict[str, list[Answer]] = field(default_factory=dict)
    heard: list[Heard] = field(default_factory=list)
    active: dict[str, int] = field(default_factory=dict)
    most: dict[str, int] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def asked(self, path: str) -> list[Heard]:
        return [one for one in self.heard if one.path == path]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            heard = await _request(reader)
            self.heard.append(heard)
            self.active[heard.path] = self.active.get(heard.path, 0) + 1
            self.most[heard.path] = max(self.most.get(heard.path, 0), self.active[heard.path])
            try:
                await self._answer(reader, writer, heard)
            finally:
                self.active[heard.path] -= 1
        except (ConnectionError, asyncio.IncompleteReadError):
            return  # the caller has gone, as many tests want it to
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, heard: Heard) -> None:
        listed = self.answers.get(heard.path, [fails(404)])
        answer = listed.pop(0) if len(listed) > 1 else listed[0]
        if isinstance(answer, bytes):
            writer.write(answer)
            await writer.drain()
        else:
            await answer(reader, writer, heard)


async def _request(reader: asyncio.StreamReader) -> Heard:
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")[:-2]
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    method, path, _ = first.split(" ")
    return Heard(method, path, headers, json.loads(body) if body else None)


def usual(**more: Answer | list[Answer]) -> dict[str, list[Answer]]:
    """A sound server that is not known by name. `more`: by the last part of the path."""
    answers: dict[str, list[Answer]] = {
        "/v1/models": [models()],
        "/health": [says({})],
        "/v1/completions": [tells("one", " two")],
        "/v1/chat/completions": [tells("one", " two")],
    }
    for name, answer in more.items():
        path = next((one for one in answers if one.rpartition("/")[2] == name), f"/v1/{name}")
        answers[path] = answer if isinstance(answer, list) else [answer]
    return answers


@asynccontextmanager
async def an_upstream(answers: dict[str, list[Answer]] | None = None) -> AsyncIterator[Upstream]:
    upstream = Upstream(answers=usual() if answers is None else answers)
    server = await asyncio.start_server(upstream.serve, "127.0.0.1", 0)
    upstream.port = server.sockets[0].getsockname()[1]
    try:
        yield upstream
    finally:
        server.close()


@contextmanager
def upstream_beside(answers: dict[str, list[Answer]] | None = None) -> Iterator[Upstream]:
    """The same on a thread of its own, for a test of a service that is a process."""
    loop, is_up, upstreams = asyncio.new_event_loop(), threading.Event(), list[Upstream]()

    async def main() -> None:
        async with an_upstream(answers) as upstream:
            upstreams.append(upstream)
            is_up.set()
            await asyncio.Event().wait()

    task = loop.create_task(main())
    thread = threading.Thread(target=lambda: loop.run_until_complete(asyncio.wait([task])))
    thread.start()
    try:
        assert is_up.wait(20)
        yield upstreams[0]
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join()
        for left in asyncio.all_tasks(loop):
            left.cancel()
            loop.run_until_complete(asyncio.wait([left]))
        loop.close()
