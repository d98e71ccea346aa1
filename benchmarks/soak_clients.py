"""What the clients of soak.py do: each draws its next act from its own dice."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

from lean import Connection
from served import TOKEN

HEADERS = {"Authorization": f"Bearer {TOKEN}"}
PROMPTS = ("Once upon a time", "The fox", "A little bird sat in the tree and", "Tim and Sue went to the sea. They")
STREAM_S = 60.0
FULL = (429, 503)  # no room now, or no worker: the client comes back later
LAST_EVENT = re.compile(rb"event: (end|error)\n")
CODE = re.compile(rb'"code": ?"(\w+)"')


class Client:
    """One after the other, until the time is over. `counts` gets a line for each: the act, and how it ended."""

    def __init__(self, address: str, dice: random.Random, counts: Counter[str]) -> None:
        self._address = address
        self._dice = dice
        self._counts = counts
        self._control = Connection(address, HEADERS)
        self._acts: list[tuple[str, int, Callable[[], Awaitable[str]]]] = [
            ("read", 5, self._read),
            ("cancel", 3, self._cancel),
            ("deadline", 2, self._deadline),
            ("leave", 2, self._leave),
            ("come back", 2, self._come_back),
            ("session", 2, self._session),
            ("chat", 3, self._chat),
            ("chat, left", 1, self._chat_left),
            ("completion", 2, self._completion),
            ("wrong", 1, self._wrong),
        ]

    async def run(self, until: float) -> None:
        names, weights, acts = zip(*self._acts, strict=True)
        while time.monotonic() < until:
            number = self._dice.choices(range(len(acts)), weights)[0]
            outcome = await asyncio.wait_for(acts[number](), STREAM_S)
            self._counts[f"{names[number]}: {outcome}"] += 1
            if outcome.split()[0] in map(str, FULL):
                await asyncio.sleep(self._dice.uniform(0.05, 0.3))
        self._control.close()

    # Acts. Each returns how it ended.

    async def _read(self) -> str:
        admitted = await self._submit(self._body())
        return admitted if " " in admitted else await self._stream(admitted)

    async def _cancel(self) -> str:
        task_id = await self._submit(self._body())
        if " " in task_id:
            return task_id
        stream = Connection(self._address, HEADERS)
        await self._some(stream, f"/v1/tasks/{task_id}/stream", self._dice.randrange(1, 8))
        await self._ask("POST", f"/v1/tasks/{task_id}/cancel")
        stream.close()
        return await self._stream(task_id)

    async def _deadline(self) -> str:
        task_id = await self._submit({**self._body(), "deadline_ms": self._dice.choice((1, 20, 100, 400))})
        return task_id if " " in task_id else await self._stream(task_id)

    async def _leave(self) -> str:
        task_id = await self._submit(self._body())
        if " " in task_id:
            return task_id
        stream = Connection(self._address, HEADERS)
        await self._some(stream, f"/v1/tasks/{task_id}/stream", self._dice.randrange(0, 5))
        stream.close()
        return "left"

    async def _come_back(self) -> str:
        task_id = await self._submit(self._body())
        if " " in task_id:
            return task_id
        stream = Connection(self._address, HEADERS)
        seen = await self._some(stream, f"/v1/tasks/{task_id}/stream", self._dice.randrange(1, 5))
        stream.close()
        numbers = re.findall(rb"^id: (\d+)$", seen, re.MULTILINE)
        return await self._stream(task_id, {"Last-Event-ID": numbers[-1].decode()} if numbers else {})

    async def _session(self) -> str:
        session_id = str(uuid.UUID(int=self._dice.getrandbits(128), version=4))
        body = {**self._body(), "session_id": session_id}
        outcome = ""
        for _ in range(self._dice.randrange(1, 4)):
            task_id = await self._submit(body)
            outcome = task_id if " " in task_id else await self._stream(task_id)
            if outcome != "end":
                break
            body["prompt"] += " and then the cat said"
        if self._dice.random() < 0.5:  # others are left to expire
            await self._ask("DELETE", f"/v1/sessions/{session_id}")
        return outcome

    async def _chat(self) -> str:
        is_streamed = self._dice.random() < 0.5
        answer = await self._ask("POST", "/v1/chat/completions", self._openai(stream=is_streamed))
        if self._control.status != 200:
            return self._refused(answer)
        return "end" if not is_streamed or b"[DONE]" in answer else f"error {code(answer)}"

    async def _chat_left(self) -> str:
        connection = Connection(self._address, HEADERS)
        await connection.send("POST", "/v1/chat/completions", json.dumps(self._openai(stream=True)).encode())
        async for _ in connection.parts():
            if self._dice.random() < 0.4:
                break
        connection.close()
        return "left"

    async def _completion(self) -> str:
        body = {"model": "builtin:tiny", "prompt": self._dice.choice(PROMPTS), "max_tokens": 16}
        answer = await self._ask("POST", "/v1/completions", body)
        return "end" if self._control.status == 200 else self._refused(answer)

    async def _wrong(self) -> str:
        wrong: tuple[dict[str, Any], ...] = (
            {"prompt": "no model"},
            {**self._body(), "max_tokens": 0},
            {**self._body(), "max_tokens": 100_000},
            {**self._body(), "no_such_field": 1},
        )
        answer = await self._ask("POST", "/v1/tasks", self._dice.choice(wrong))
        is_refusal = 400 <= self._control.status < 500 or self._control.status in FULL
        return self._refused(answer) if is_refusal else f"unexpected {self._control.status}"

    # Parts of them.

    def _body(self) -> dict[str, Any]:
        dice = self._dice
        return {
            "model_ref": "builtin:tiny",
            "engine": dice.choice(("llamacpp", "llamacpp", "ctransformers")),
            "prompt": dice.choice(PROMPTS),
            "max_tokens": dice.choice((1, 4, 16, 48)),
            "determinism": dice.choice(("strict", "best_effort", "best_effort")),
            "priority": dice.choice(("interactive", "batch")),
            "seed": dice.randrange(1000),
        }

    def _openai(self, *, stream: bool) -> dict[str, Any]:
        messages = [{"role": "user", "content": self._dice.choice(PROMPTS)}]
        return {"model": "builtin:tiny", "messages": messages, "max_tokens": 16, "stream": stream}

    async def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> bytes:
        return await self._control.ask(method, path, b"" if body is None else json.dumps(body).encode())

    async def _submit(self, body: dict[str, Any]) -> str:
        """The task's id; a refusal as a text with a space in it."""
        answer = await self._ask("POST", "/v1/tasks", body)
        if self._control.status != 202:
            return self._refused(answer)
        return str(json.loads(answer)["task_id"])

    def _refused(self, answer: bytes) -> str:
        return f"{self._control.status} {code(answer)}"

    async def _stream(self, task_id: str, headers: dict[str, str] | None = None) -> str:
        """Read to the end; `end`, or the error's code."""
        connection = Connection(self._address, {**HEADERS, **(headers or {})})
        answer = await connection.ask("GET", f"/v1/tasks/{task_id}/stream")
        connection.close()
        if connection.status != 200:
            return f"stream {connection.status} {code(answer)}"
        last = LAST_EVENT.findall(answer)
        if not last:
            return "unexpected end of the stream"
        return "end" if last[-1] == b"end" else f"error {code(answer)}"

    @staticmethod
    async def _some(connection: Connection, path: str, parts: int) -> bytes:
        """The first parts of a stream."""
        await connection.send("GET", path)
        seen = b""
        async for part in connection.parts():
            seen += part
            parts -= 1
            if parts <= 0:
                break
        return seen


def code(answer: bytes) -> str:
    """Of an error, ours or OpenAI's."""
    found = CODE.search(answer)
    return found[1].decode() if found else "without a code"
