"""What 1,000 open streams of waiting tasks cost, against one.

    python benchmarks/open_streams.py [--streams 1000] [--decoding 4] [--seconds 10] [--rounds 3]

One service whose worker decodes at a fixed pace (paced_server.py): some tasks decode, the others wait in the queue, and
the stream of each is read. In turns with one waiting stream and with many. The lag of the event loop is measured from
outside, as the milliseconds that `GET /healthz` takes, asked every 10 ms on a kept connection: whatever holds the loop
holds the answer, the answer itself included (which makes it an upper bound). Memory is the growth of the service's
resident size in its first round, by stream that waits.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path

from lean import Connection, resident_bytes
from paced_server import paced_engine
from served import TOKEN, a_service, until_ready
from verdict import at_most, three

HEADERS = {"Authorization": f"Bearer {TOKEN}"}
TOKENS_PER_S = 20.0
CTX, LONG = 2048, 2000  # as long as the model of our stand-in may go on: 100 s, which must outlast a round
ASK_EVERY_S = 0.01


class Stream:
    """One task and its stream, which somebody reads."""

    def __init__(self, address: str) -> None:
        self._connection = Connection(address, HEADERS)
        self._reader: asyncio.Task[None] | None = None
        self.task_id = ""
        self.frames = 0

    async def open(self, max_tokens: int) -> None:
        body = {
            "model_ref": "builtin:tiny", "prompt": "Once", "max_tokens": max_tokens, "determinism": "best_effort"
        }  # fmt: skip
        answer = await self._connection.ask("POST", "/v1/tasks", json.dumps(body).encode())
        if self._connection.status != 202:
            raise RuntimeError(f"not admitted: {answer!r}")
        self.task_id = json.loads(answer)["task_id"]
        await self._connection.send("GET", f"/v1/tasks/{self.task_id}/stream")
        self._reader = asyncio.ensure_future(self._read())

    async def _read(self) -> None:
        async for part in self._connection.parts():
            self.frames += part.count(b"event: ")
            self._connection.chunks[len(self._connection.chunks) - 1] = b""

    async def end(self, control: Connection) -> None:
        await control.ask("POST", f"/v1/tasks/{self.task_id}/cancel")
        if self._reader is not None:
            await self._reader
        self._connection.close()


async def lags_ms(address: str, seconds: float) -> list[float]:
    connection = Connection(address, HEADERS)
    found, until = [], time.perf_counter() + seconds
    while time.perf_counter() < until:
        began = time.perf_counter()
        await connection.ask("GET", "/healthz")
        found.append((time.perf_counter() - began) * 1000)
        await asyncio.sleep(ASK_EVERY_S)
    connection.close()
    return found


def p99(values: list[float]) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * 0.99))]


async def one_round(address: str, pid: int, decoding: int, waiting: int, seconds: float) -> tuple[list[float], float]:
    """Lags in ms, and what the process grew by in bytes for each stream that waits."""
    at_work = [Stream(address) for _ in range(decoding)]
    for stream in at_work:
        await stream.open(LONG)
    while any(stream.frames < 5 for stream in at_work):  # noqa: ASYNC110
        await asyncio.sleep(0.05)
    before = resident_bytes(pid)
    queued = [Stream(address) for _ in range(waiting)]
    for stream in queued:
        await stream.open(64)
    await asyncio.sleep(1.0)
    grown = (resident_bytes(pid) - before) / waiting
    lags = await lags_ms(address, seconds)
    control = Connection(address, HEADERS)
    for stream in (*queued, *at_work):
        await stream.end(control)
    control.close()
    return lags, grown


async def main(given: argparse.Namespace) -> None:
    few: list[list[float]] = []
    many: list[list[float]] = []
    grown_bytes: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pool = {
            "slots": given.decoding, "ctx": CTX, "max_tokens": LONG, "queue": {"capacity": given.streams + 100},
        }  # fmt: skip
        configuration = {
            "server": {"max_streams": given.streams + 100},
            "pools": [pool],
            "engines": paced_engine(folder, TOKENS_PER_S),
            "logs": {"level": "warning"},
        }
        async with a_service(configuration, folder) as served:
            await until_ready(served.client)
            address = str(served.client.base_url).rstrip("/")
            await one_round(address, served.pid, given.decoding, 10, 0.5)  # warms caches
            for _ in range(given.rounds):
                few.append((await one_round(address, served.pid, given.decoding, 1, given.seconds))[0])
                lags, grown = await one_round(address, served.pid, given.decoding, given.streams, given.seconds)
                many.append(lags)
                grown_bytes.append(grown)
    print(
        f"{given.decoding} streams decode at {TOKENS_PER_S:g} tokens/s, {given.rounds} rounds of {given.seconds:g} s\n"
    )
    print(
        "| streams that wait | `GET /healthz`, ms (minimum / median / maximum) | p99, by round |\n| --- | --- | --- |"
    )
    for count, rounds in ((1, few), (given.streams, many)):
        print(f"| {count} | {three([lag for one in rounds for lag in one])} | {three([p99(one) for one in rounds])} |")
    kb = grown_bytes[0] / 1000
    print(f"\n{at_most(f'lag p99 with {given.streams} streams', statistics.median(map(p99, many)), 50, ' ms')}")
    print(at_most("memory by waiting stream", kb, 50, " kB"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--decoding", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=3)
    asyncio.run(main(parser.parse_args()))
