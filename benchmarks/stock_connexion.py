"""What is compared with: our own contract on Connexion as it comes, with handlers that do nothing.

    python benchmarks/stock_connexion.py

`createTask` answers at once with an admission that is always the same; `streamTask` is Connexion's StreamingResponse
over a queue, which a thread fills at a fixed pace, as one would write it by hand. Uvicorn with uvloop and httptools.
Prints its address. Ends with its standard input.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import connexion
import uvicorn
from connexion.resolver import Resolver
from starlette.responses import StreamingResponse

from llama_orch.api.documents import merged_document

TOKENS_PER_S = float(os.environ.get("PACED_TOKENS_PER_S", "50"))
TOKENS = int(os.environ.get("PACED_TOKENS", "500"))
ADMISSION = {
    "task_id": "00000000-0000-4000-8000-000000000000",
    "queue_position": 0,
    "predicted_start_ms": 0,
    "backoff_ms": 0,
    "pool_id": "default",
    "seed": 1,
}


class Pacer:
    """One thread for all streams: a token for each of them at each step."""

    def __init__(self) -> None:
        self._queues: set[asyncio.Queue[bytes]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def frames(self) -> AsyncIterator[bytes]:
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            threading.Thread(target=self._step, daemon=True).start()
        queue: asyncio.Queue[bytes] = asyncio.Queue()
        self._queues.add(queue)
        try:
            for _ in range(TOKENS):
                yield await queue.get()
            yield b'id: 0\nevent: end\ndata: {"tokens_out":0}\n\n'
        finally:
            self._queues.discard(queue)

    def _step(self) -> None:
        due, number = time.monotonic(), 0
        while self._loop is not None:
            due, number = due + 1 / TOKENS_PER_S, number + 1
            time.sleep(max(0.0, due - time.monotonic()))
            frame = b'id: %d\nevent: token\ndata: {"t":" word","i":%d}\n\n' % (number, number)
            for queue in list(self._queues):
                self._loop.call_soon_threadsafe(queue.put_nowait, frame)


PACER = Pacer()


async def create_task(body: dict[str, Any]) -> tuple[dict[str, Any], int]:
    return ADMISSION, 202


async def stream_task(id: str) -> StreamingResponse:
    return StreamingResponse(PACER.frames(), media_type="text/event-stream")


async def anything(**_: Any) -> tuple[dict[str, Any], int]:
    return {}, 200


def check_token(_token: str) -> dict[str, Any]:
    return {"sub": "anybody"}


def build() -> connexion.AsyncApp:
    document = merged_document(metrics_are_open=True)
    document["components"]["securitySchemes"] = {
        name: {**scheme, "x-bearerInfoFunc": "stock_connexion.check_token"}
        for name, scheme in document["components"]["securitySchemes"].items()
    }
    handlers = {"createTask": create_task, "streamTask": stream_task}
    app = connexion.AsyncApp("stock")
    app.add_api(document, resolver=Resolver(lambda operation_id: handlers.get(operation_id, anything)))
    return app


class Server(uvicorn.Server):
    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        print(f"listening on http://{host}:{port}", flush=True)


def main() -> None:
    server = Server(uvicorn.Config(build(), port=0, loop="uvloop", http="httptools", log_level="warning"))
    threading.Thread(target=lambda: (sys.stdin.read(), setattr(server, "should_exit", True)), daemon=True).start()
    server.run()


if __name__ == "__main__":
    main()
