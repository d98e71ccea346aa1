"""Processor time for each token that is passed on, against Connexion's bare one.

    python benchmarks/relay.py [--streams 32] [--tokens-per-s 50] [--seconds 8] [--rounds 5]

Ours is the whole service: a worker process sends the tokens over its socket in llama-server's dialect (paced_server.py,
so that the pace is the same for all), and the service reads, counts, logs, frames and sends them, with `metrics` frames
in between. The other side is Connexion as it comes, with a handler that streams from a queue which a thread fills at
the same pace (stock_connexion.py): no engine, state or replay. In turns; microseconds of the server by token.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from lean import Connection, cpu_s
from paced_server import paced_engine
from served import TOKEN, a_service, until_ready
from verdict import against

HEADERS = {"Authorization": f"Bearer {TOKEN}"}
TOKEN_EVENT = b"event: token"


@dataclass(frozen=True)
class Server:
    address: str
    pid: int


@asynccontextmanager
async def stock(tokens_per_s: float) -> AsyncIterator[Server]:
    """Connexion as it comes."""
    env = {**os.environ, "PACED_TOKENS_PER_S": str(tokens_per_s), "PACED_TOKENS": "1000000"}
    script = Path(__file__).with_name("stock_connexion.py")
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(script), env=env, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        said = (await process.stdout.readline()).decode()
        yield Server(said.removeprefix("listening on ").strip(), process.pid)
    finally:
        process.stdin.close()
        await process.wait()


async def opened(server: Server, tokens: int | None) -> Connection:
    """A stream that has not begun. `tokens`: submit a task of so many first."""
    connection = Connection(server.address, HEADERS)
    task_id = "00000000-0000-4000-8000-000000000000"
    if tokens is not None:
        body = {"model_ref": "builtin:tiny", "prompt": "Once", "max_tokens": tokens, "determinism": "best_effort"}
        task_id = json.loads(await connection.ask("POST", "/v1/tasks", json.dumps(body).encode()))["task_id"]
    await connection.send("GET", f"/v1/tasks/{task_id}/stream")
    return connection


async def us_per_token(server: Server, streams: int, seconds: float, tokens: int | None) -> float:
    connections = [await opened(server, tokens) for _ in range(streams)]
    count = 0

    async def read(connection: Connection) -> None:
        nonlocal count
        async for part in connection.parts():
            count += part.count(TOKEN_EVENT)
            connection.chunks[len(connection.chunks) - 1] = b""

    readers = [asyncio.ensure_future(read(connection)) for connection in connections]
    await asyncio.sleep(1.0)  # all flow
    began, before = cpu_s(server.pid), count
    await asyncio.sleep(seconds)
    spent, passed = cpu_s(server.pid) - began, count - before
    for reader in readers:
        reader.cancel()
    await asyncio.gather(*readers, return_exceptions=True)
    for connection in connections:
        connection.close()
    return 1e6 * spent / passed


async def main(streams: int, tokens_per_s: float, seconds: float, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        configuration = {
            "pools": [{"slots": streams, "ctx": 2048, "max_tokens": 1024}],
            "engines": paced_engine(folder, tokens_per_s),
            "logs": {"level": "warning"},
        }
        async with a_service(configuration, folder) as served, stock(tokens_per_s) as other:
            await until_ready(served.client)
            ours = Server(str(served.client.base_url).rstrip("/"), served.pid)
            found: dict[str, list[float]] = {"the service": [], "bare Connexion": []}
            for _ in range(rounds):
                tokens = int(tokens_per_s * (seconds + 3))
                found["the service"].append(await us_per_token(ours, streams, seconds, tokens))
                found["bare Connexion"].append(await us_per_token(other, streams, seconds, None))
                await asyncio.sleep(2.5)  # the service's tasks end, and their slots are free
    print(f"{streams} streams at {tokens_per_s:g} tokens/s, {rounds} rounds of {seconds:g} s: CPU by token, µs")
    print("\n".join(against(found, 1)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens-per-s", type=float, default=50.0)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    asyncio.run(main(given.streams, given.tokens_per_s, given.seconds, given.rounds))
