"""A stand-in for llama-server that decodes nothing: at each step of a fixed pace every stream gets a token, as it is
where one batch is evaluated for all slots, so that what is measured is the relay and not the model. The service takes
it for the user's own binary (`engines.llamacpp.launcher: binary`) and speaks to it as to any worker, over the same
socket and in the same dialect, with the events that llama-server writes.
    paced_server.py --host /path/engine.sock --parallel 32 --ctx-size 65536 --tokens-per-s 50 …
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def paced_engine(folder: Path, tokens_per_s: float) -> Mapping[str, Any]:
    """The configuration's section `engines` for it. Writes an executable file to `folder`."""
    binary = folder / "paced-llama-server"
    command = f"{sys.executable} -P {Path(__file__).resolve()}"
    binary.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    binary.chmod(0o700)
    extra_args = ["--tokens-per-s", str(tokens_per_s)]
    return {"llamacpp": {"launcher": "binary", "binary": str(binary), "extra_args": extra_args}}


@dataclass(eq=False)
class _Run:
    writer: asyncio.StreamWriter
    tokens: int
    done: asyncio.Future[None]
    made: int = 0


class Server:
    def __init__(self, slots: int, ctx: int, tokens_per_s: float) -> None:
        self._slots = slots
        self._step_s = 1 / tokens_per_s
        self._ctx = ctx
        self._busy: set[int] = set()
        self._runs: set[_Run] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                lines = head.decode().split("\r\n")
                method, path, _ = lines[0].split(" ", 2)
                headers = {name.lower(): value.strip() for name, _, value in (one.partition(":") for one in lines[1:])}
                body = await reader.readexactly(int(headers.get("content-length", "0")))
                await self._answer(method, path.partition("?")[0], json.loads(body or b"{}"), writer)
                if headers.get("connection") == "close":
                    break
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass  # the client has left, which is how it cancels
        finally:
            writer.close()

    async def _answer(self, method: str, path: str, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        match method, path:
            case "POST", "/completion":
                await self._complete(body, writer)
            case "POST", "/tokenize":
                self._send(writer, {"tokens": list(range(1 + len(str(body.get("content", "")).split())))})
            case "GET", "/slots":
                self._send(writer, [{"id": n, "is_processing": n in self._busy} for n in range(self._slots)])
            case "GET", "/props":
                made = {"n_ctx": self._ctx // self._slots}
                self._send(
                    writer, {"total_slots": self._slots, "default_generation_settings": made, "build_info": "paced"}
                )
            case _:
                self._send(writer, {"status": "ok"})

    @staticmethod
    def _send(writer: asyncio.StreamWriter, answer: object) -> None:
        data = json.dumps(answer).encode()
        head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        writer.write(head.encode() + data)

    async def _complete(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        slot, tokens = int(body["id_slot"]), int(body["n_predict"])
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        run = _Run(writer, tokens, asyncio.get_running_loop().create_future())
        self._busy.add(slot)
        self._runs.add(run)
        try:
            await run.done
        finally:
            self._runs.discard(run)
            self._busy.discard(slot)
        last = {"content": "", "stop": True, "tokens_predicted": tokens, "tokens_evaluated": 1}
        times = {"cache_n": 0, "prompt_n": 1, "prompt_ms": 0.1, "predicted_ms": 1000 * tokens * self._step_s}
        self._event(writer, {**last, "stop_type": "limit", "timings": {**times, "predicted_n": tokens}})
        writer.write(b"0\r\n\r\n")

    async def step(self) -> None:
        """All streams at once, and cheaply, as a server that is not written in Python would."""
        loop, due = asyncio.get_running_loop(), asyncio.get_running_loop().time()
        while True:
            due += self._step_s
            await asyncio.sleep(max(0.0, due - loop.time()))
            for run in list(self._runs):
                if run.writer.is_closing():
                    run.done.cancel()
                    continue
                run.made += 1
                event = b'data: {"content":" word","stop":false,"tokens_predicted":%d}\n\n' % run.made
                run.writer.transport.write(b"%x\r\n%b\r\n" % (len(event), event))
                if run.made == run.tokens and not run.done.done():
                    run.done.set_result(None)
                    self._runs.discard(run)

    @staticmethod
    def _event(writer: asyncio.StreamWriter, event: dict[str, Any]) -> None:
        data = b"data: " + json.dumps(event).encode() + b"\n\n"
        writer.write(b"%x\r\n%b\r\n" % (len(data), data))


async def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--host", required=True)
    parser.add_argument("--parallel", type=int, required=True)
    parser.add_argument("--ctx-size", type=int, required=True)
    parser.add_argument("--tokens-per-s", type=float, default=50.0)
    known, _ = parser.parse_known_args()
    server = Server(known.parallel, known.ctx_size, known.tokens_per_s)
    async with await asyncio.start_unix_server(server.serve, known.host):
        await server.step()


if __name__ == "__main__":
    asyncio.run(main())
