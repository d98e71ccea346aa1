"""How long until the service listens, and until the first token of builtin:tiny, against Python that does nothing.

    python benchmarks/cold_start.py [--rounds 10]

In turns: `python -c pass`; then `llama-orch serve` in an empty home, from the start of the process to the line that it
listens, to the first token of a task that is submitted at once (its model is still loading). Seconds: minimum, median,
maximum. The files are in the page cache, as after a first start.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from lean import Connection
from served import TOKEN, a_service
from verdict import at_most, three

HEADERS = {"Authorization": f"Bearer {TOKEN}"}


async def nothing_s() -> float:
    began = time.perf_counter()
    process = await asyncio.create_subprocess_exec(sys.executable, "-P", "-c", "pass")
    await process.wait()
    return time.perf_counter() - began


async def start_s() -> tuple[float, float]:
    """Seconds from the start of the process until it listens, and until the first token."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        async with a_service({"logs": {"level": "warning"}}, Path(folder)) as served:
            listening = time.perf_counter() - began
            connection = Connection(str(served.client.base_url).rstrip("/"), HEADERS)
            body = {"model_ref": "builtin:tiny", "prompt": "Once upon a time", "max_tokens": 8}
            admission = json.loads(await connection.ask("POST", "/v1/tasks", json.dumps(body).encode()))
            await connection.send("GET", f"/v1/tasks/{admission['task_id']}/stream")
            seen = b""
            async for part in connection.parts():
                seen += part
                if b"event: token" in seen:
                    break
            else:
                raise RuntimeError(f"no token: {seen!r}")
            first = time.perf_counter() - began
            connection.close()
            return listening, first


async def main(rounds: int) -> None:
    nothing, listening, first = [], [], []
    await start_s()  # the first one writes the bytecode that an installed package has
    for _ in range(rounds):
        nothing.append(await nothing_s())
        one = await start_s()
        listening.append(one[0])
        first.append(one[1])
    print(
        f"{rounds} rounds in turns\n\n| from the start of the process | s, minimum / median / maximum |\n| --- | --- |"
    )
    for name, values in (("`python -c pass`", nothing), ("listening", listening), ("first token", first)):
        print(f"| {name} | {three(values)} |")
    print(f"\n{at_most('cold start to listening', statistics.median(listening), 0.6, ' s')}")
    print(at_most("cold start to the first token", statistics.median(first), 1.5, " s"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    asyncio.run(main(parser.parse_args().rounds))
