"""Where the time goes: a flame graph of the service for each path, and the parts of it in one line each.

    python benchmarks/flames.py [--out FOLDER] [--seconds 6]

Paths: `relay` (32 streams at 50 tokens/s), `admission` (POST /v1/tasks by 8 clients), `chat` (one OpenAI chat of 8
tokens after the other, on llama.cpp). py-spy looks 500 times a second at the service's own process; the share of a part
is that of the samples in which it was at work, with all that it called. Writes FOLDER/PATH.svg.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from admission import us_per_request
from lean import Connection
from paced_server import paced_engine
from relay import HEADERS, Server, us_per_token
from served import a_service, until_ready

RATE = 500
# A part of the service, by the places in the code that it begins at.
PARTS = {
    "Connexion, routing, checks, handlers": r"connexion/apps/abstract.py",
    "the submission of a task": r"Orchestrator.submit ",
    "counting and templates, with the worker": r"Intake.measure ",
    "the core": r"\(llama_orch/core/",
    "decoding: from the worker's socket to frames": r"Decoding._run_task ",
    "streams: from frames to the socket": r"EventStream.__call__ ",
    "system calls that send": r"RequestResponseCycle.send \(uvicorn.*:5[245]\d\)$",
    "log lines": r"logging/__init__.py",
}


async def recorded(pid: int, kind: str, file: Path, seconds: float) -> None:
    py_spy = shutil.which("py-spy", path=str(Path(sys.executable).parent))
    if py_spy is None:
        raise SystemExit("py-spy is not here: install the dependency group `bench`")
    command = [
        py_spy,
        "record",
        "-p",
        str(pid),
        "-d",
        str(round(seconds)),
        "-r",
        str(RATE),
        "-f",
        kind,
        "-o",
        str(file),
    ]
    quiet = asyncio.subprocess.DEVNULL
    process = await asyncio.create_subprocess_exec(*command, stdout=quiet, stderr=quiet)
    if await process.wait():
        raise SystemExit(f"py-spy could not look into process {pid}")


def shares(raw: str) -> dict[str, float]:
    """Of the samples of the loop's thread, by part."""
    found: Counter[str] = Counter()
    total = 0
    for line in raw.splitlines():
        stack, _, count = line.rpartition(" ")
        if "run_server" not in stack:  # a thread that waits for work
            continue
        total += int(count)
        found.update({part: int(count) for part, where in PARTS.items() if re.search(where, stack, re.MULTILINE)})
    return {part: found[part] / max(1, total) for part in PARTS}


async def watch(
    name: str, configuration: Mapping[str, Any], load: Callable[[Server], Awaitable[object]], out: Path, seconds: float
) -> None:
    with tempfile.TemporaryDirectory() as home:
        async with a_service(configuration, Path(home)) as served:
            await until_ready(served.client)
            server = Server(str(served.client.base_url).rstrip("/"), served.pid)
            loading = asyncio.ensure_future(load(server))
            await asyncio.sleep(1.5)
            raw = out / f"{name}.raw"
            await recorded(served.pid, "raw", raw, seconds / 2)
            await recorded(served.pid, "flamegraph", out / f"{name}.svg", seconds / 2)
            loading.cancel()
            await asyncio.gather(loading, return_exceptions=True)
    print(f"| {name} | " + " | ".join(f"{share:.0%}" for share in shares(raw.read_text()).values()) + " |")
    raw.unlink()


async def admissions(server: Server) -> None:
    while True:
        await us_per_request(server, 1000)


async def chats(server: Server) -> None:
    asked = {
        "model": "builtin:tiny",
        "max_tokens": 8,
        "stream": True,
        "messages": [{"role": "user", "content": "A fox?"}],
    }
    connection = Connection(server.address, HEADERS)
    while True:
        await connection.ask("POST", "/v1/chat/completions", json.dumps(asked).encode())


async def main(out: Path, seconds: float) -> None:
    print("| path | " + " | ".join(PARTS) + " |")
    print("| --- " * (len(PARTS) + 1) + "|")
    quiet = {"logs": {"level": "info"}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        slots = {"pools": [{"slots": 32, "max_tokens": 1024}], "engines": paced_engine(folder, 50.0)} | quiet
        tokens = int(50 * (seconds + 8))
        await watch("relay", slots, lambda server: us_per_token(server, 32, seconds + 5, tokens), out, seconds)
        queue = {
            "pools": [{"slots": 1, "queue": {"capacity": 1_000_000}}],
            "engines": paced_engine(folder, 1.0),
        } | quiet
        await watch("admission", queue, admissions, out, seconds)
    await watch("chat", {"pools": [{"slots": 1}]} | quiet, chats, out, seconds)
    print(f"\nflame graphs: {out}/*.svg")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("flames"))
    parser.add_argument("--seconds", type=float, default=6.0)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    asyncio.run(main(given.out, given.seconds))
