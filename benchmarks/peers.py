"""Beside LiteLLM's proxy: time to the first token, processor time and memory, in front of the same kind of worker.

    python benchmarks/peers.py [--litellm PATH] [--rounds 5] [--requests 40] [--seconds 8]

Three ways to `POST /v1/chat/completions` with `stream: true`: llama.cpp's own server with builtin:tiny directly
(plain_server.py), LiteLLM's proxy before that server (one process, no database, a master key), and our service before a
worker with the same parameters. In turns, one request at a time and 8 at once; answers of 8 tokens, every prompt new.
Processor time is that of the proxy's processes, without the worker. Then tokens per second of 8 streams that are kept
going, ours against directly, up to 200 tokens each. `--litellm` is the executable of LiteLLM in an environment of its
own, since its pins are not ours; without it only the rest is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from lean import Connection, cpu_s, resident_bytes
from plain_server import KEY, a_plain_server
from served import TOKEN, a_service, until_ready
from verdict import at_least, at_most, three

MASTER_KEY = "sk-benchmark-0123456789"
AT_ONCE, CTX = 8, 1024
THREADS = len(os.sched_getaffinity(0))  # what the service gives to a lone worker
SAMPLERS = ["penalties", "top_k", "top_p", "min_p", "temperature"]  # those that the service asks its workers for
WRITTEN = re.compile(rb'"(?:content|text)": ?"[^"]')
START_S = 120.0
DIRECTLY, LITELLM, OURS = "the worker directly", "LiteLLM's proxy", "our service"


class PeerFailed(Exception):
    """LiteLLM's proxy did not start."""


@dataclass
class Side:
    """One way to the model, and what was measured on it."""

    name: str
    address: str
    headers: dict[str, str]
    model: str
    pid: int | None  # of what stands between: None for the worker itself
    first_ms: dict[int, list[float]] = field(default_factory=lambda: {1: [], AT_ONCE: []})
    cpu_ms: dict[int, list[float]] = field(default_factory=lambda: {1: [], AT_ONCE: []})
    tokens_per_s: list[float] = field(default_factory=list)
    resident_mib: float = 0.0

    def cpu_s(self) -> float:
        return 0.0 if self.pid is None else sum(cpu_s(pid) for pid in family(self.pid))

    def connection(self) -> Connection:
        return Connection(self.address, self.headers)


def family(pid: int) -> list[int]:
    """The process and its Python children; a worker of ours is not one (it has a session of its own)."""
    session, found, waiting = os.getsid(pid), [], [pid]
    while waiting:
        one = waiting.pop()
        found.append(one)
        try:
            children = [
                int(child)
                for task in Path(f"/proc/{one}/task").iterdir()
                for child in (task / "children").read_text().split()
            ]
            waiting += [child for child in children if os.getsid(child) == session]
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended
    return found


async def first_token_ms(side: Side, number: int) -> float:
    """One request, read to its end, on a connection of its own: llama.cpp's server closes kept ones as it likes."""
    connection = side.connection()
    words = f"{number} foxes and {number * 7 % 1000} hens: a story?"
    asked = {"messages": [{"role": "user", "content": words}], "max_tokens": 8, "stream": True, "model": side.model}
    body = json.dumps(asked).encode()
    began, first = time.perf_counter(), 0.0
    await connection.send("POST", "/v1/chat/completions", body)
    async for part in connection.parts():
        if not first and WRITTEN.search(part):
            first = (time.perf_counter() - began) * 1000
    connection.close()
    if connection.status != 200 or not first:
        raise RuntimeError(f"{side.name} answered {connection.status}: {b''.join(connection.chunks)[:500]!r}")
    return first


async def measure_requests(side: Side, at_once: int, requests: int, start: int, *, keep: bool = True) -> None:
    """A block of requests by `at_once` clients."""
    numbers = iter(range(start, start + requests))
    firsts: list[float] = []

    async def client() -> None:
        for number in numbers:
            firsts.append(await first_token_ms(side, number))

    before = side.cpu_s()
    await asyncio.gather(*(client() for _ in range(at_once)))
    if keep:
        side.first_ms[at_once] += firsts
        side.cpu_ms[at_once].append(1000 * (side.cpu_s() - before) / requests)


async def tokens_per_s(side: Side, seconds: float, start: int) -> float:
    """8 streams, each followed by the next one; tokens that arrived after the first second."""
    count, is_over = 0, False

    async def client(number: int) -> None:
        nonlocal count
        while not is_over:
            connection = side.connection()
            asked = {"prompt": f"{number} foxes once", "max_tokens": 200, "stream": True, "model": side.model}
            asked |= {"seed": number} | ({"samplers": SAMPLERS} if side.name == DIRECTLY else {})
            await connection.send("POST", "/v1/completions", json.dumps(asked).encode())
            async for part in connection.parts():
                count += len(WRITTEN.findall(part))
                if is_over:
                    break
            connection.close()
            number += AT_ONCE

    clients = [asyncio.ensure_future(client(start + number)) for number in range(AT_ONCE)]
    await asyncio.sleep(1.0)
    before, began = count, time.perf_counter()
    await asyncio.sleep(seconds)
    found = (count - before) / (time.perf_counter() - began)
    is_over = True
    await asyncio.gather(*clients)
    return found


@asynccontextmanager
async def litellm_proxy(executable: Path, worker: str, folder: Path) -> AsyncIterator[Side]:
    """The proxy, ready, before the worker."""
    behind = {"model": "openai/tiny", "api_base": f"{worker}/v1", "api_key": KEY}
    config = folder / "litellm.yaml"
    settings = {
        "model_list": [{"model_name": "tiny", "litellm_params": behind}],
        "general_settings": {"master_key": MASTER_KEY},
    }
    config.write_text(json.dumps(settings))  # JSON is YAML
    port, log_path = free_port(), folder / "litellm.log"
    env = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR"}
    env.pop("PYTHONPATH", None)
    arguments = ["--config", str(config), "--host", "127.0.0.1", "--port", str(port), "--num_workers", "1"]
    with log_path.open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            str(executable), *arguments, "--telemetry", "False", env=env, stdout=log, stderr=log, cwd=folder
        )
    address = f"http://127.0.0.1:{port}"
    try:
        await answers(f"{address}/health/liveliness", process, log_path)
        yield Side(LITELLM, address, {"Authorization": f"Bearer {MASTER_KEY}"}, "tiny", process.pid)
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def answers(url: str, process: asyncio.subprocess.Process, log_path: Path) -> None:
    deadline = time.monotonic() + START_S
    async with httpx.AsyncClient(trust_env=False) as client:
        while True:
            try:
                if (await client.get(url)).status_code == 200:
                    return
            except httpx.TransportError:
                pass  # it does not listen yet
            if process.returncode is not None or time.monotonic() > deadline:
                raise PeerFailed(last_words(log_path))
            await asyncio.sleep(0.2)


def last_words(log_path: Path) -> str:
    return log_path.read_text(errors="replace")[-2000:]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


async def measured(given: argparse.Namespace) -> list[Side]:
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        worker = await stack.enter_async_context(a_plain_server(AT_ONCE, CTX, THREADS))
        sides = [Side(DIRECTLY, worker, {"Authorization": f"Bearer {KEY}"}, "tiny", None)]
        if given.litellm is not None:
            sides.append(await stack.enter_async_context(litellm_proxy(given.litellm, worker, folder)))
        configuration = {"pools": [{"slots": AT_ONCE, "ctx": CTX, "replicas": 1}], "logs": {"level": "warning"}}
        served = await stack.enter_async_context(a_service(configuration, folder / "home"))
        await until_ready(served.client)
        headers = {"Authorization": f"Bearer {TOKEN}", "X-Determinism": "best_effort"}
        address = str(served.client.base_url).rstrip("/")
        ours = Side(OURS, address, headers, "builtin:tiny", served.pid)
        sides.append(ours)
        for side in sides:
            await measure_requests(side, AT_ONCE, 2 * AT_ONCE, 0, keep=False)
        await asyncio.sleep(2.0)
        for side in sides:
            if side.pid is not None:
                side.resident_mib = sum(resident_bytes(pid) for pid in family(side.pid)) / 2**20
        number = 1000
        for _ in range(given.rounds):
            for at_once in (1, AT_ONCE):
                for side in sides:
                    await measure_requests(side, at_once, given.requests, number)
                    number += given.requests
            for side in (sides[0], ours):
                side.tokens_per_s.append(await tokens_per_s(side, given.seconds, number))
        return sides


def report(sides: list[Side]) -> list[str]:
    lines = ["| | requests at once | ms to the first token | CPU of the proxy by request, ms | resident, idle, MiB |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for side in sides:
        for at_once in (1, AT_ONCE):
            cells = ["-", "-"]
            if side.pid is not None:
                cells = [three(side.cpu_ms[at_once]), f"{side.resident_mib:.0f}"]
            lines.append(f"| {side.name} | {at_once} | {three(side.first_ms[at_once])} | {' | '.join(cells)} |")
    direct, ours = sides[0], sides[-1]
    lines += ["", f"| {AT_ONCE} streams | tokens/s |", "| --- | --- |"]
    lines += [f"| {side.name} | {three(side.tokens_per_s, 0)} |" for side in (direct, ours)]
    middle = statistics.median
    lines.append("")
    added = middle(ours.first_ms[1]) - middle(direct.first_ms[1])
    lines.append(at_most("time to first token that the service adds, idle", added, 2.0, " ms"))
    ratios = [mine / his for mine, his in zip(ours.tokens_per_s, direct.tokens_per_s, strict=True)]
    lines.append(at_least(f"tokens/s of {AT_ONCE} streams over directly", middle(ratios), 0.97))
    for peer in sides[1:-1]:
        for at_once in (1, AT_ONCE):
            theirs = middle(peer.first_ms[at_once]) - middle(direct.first_ms[at_once])
            mine = middle(ours.first_ms[at_once]) - middle(direct.first_ms[at_once])
            said = f"{at_once} at once, over {peer.name}"
            lines.append(at_most(f"time to first token that is added, {said}", mine / theirs, 0.2))
            whole = middle(ours.first_ms[at_once]) / middle(peer.first_ms[at_once])
            lines.append(at_most(f"time to first token with the worker's, {said}", whole, 0.2))
            spent = middle(ours.cpu_ms[at_once]) / middle(peer.cpu_ms[at_once])
            lines.append(at_most(f"CPU by request, {said}", spent, 0.2))
        lines.append(at_most(f"resident memory over {peer.name}", ours.resident_mib / peer.resident_mib, 0.25))
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--litellm", type=Path, default=None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=8.0)
    given = parser.parse_args()
    if given.litellm is None:
        print("LiteLLM's proxy is not measured: --litellm was not given\n")
    try:
        sides = asyncio.run(measured(given))
    except PeerFailed as error:
        print(f"LiteLLM's proxy did not start:\n{error}", file=sys.stderr)
        return 1
    print(f"{given.rounds} rounds of {given.requests} requests of each kind; minimum / median / maximum\n")
    print("\n".join(report(sides)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
