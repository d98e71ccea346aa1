"""What the service adds to the time to the first token, against the same llama.cpp worker called directly.

    python benchmarks/added_latency.py [--rounds 200]

Both in one run, in turns, each with a worker process of its own on the same model, so that a noisy machine is noisy for
both. Prints milliseconds (minimum, median, maximum) from sending the request to the first token.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from contextlib import aclosing
from pathlib import Path

from lean import Connection
from served import TOKEN, a_service, until_ready

from llama_orch.engines.base import Chunk, Job, ReplicaSpec, Sampling, Worker
from llama_orch.engines.llamacpp import LlamaCppEngine
from llama_orch.models.references import resolve

PROMPT = "Once upon a time, in a little house by the sea, there lived"
TOKENS = 8
THREADS = len(os.sched_getaffinity(0))  # what the service gives to a lone worker


async def direct_ms(worker: Worker, seed: int) -> float:
    """The worker's own client, no queue, no HTTP of ours."""
    job = Job(f"direct-{seed}", PROMPT, TOKENS, seed, Sampling(), slot=0)
    began, first = time.perf_counter(), 0.0
    async with aclosing(worker.generate(job)) as items:
        async for item in items:
            if isinstance(item, Chunk) and item.text and not first:
                first = (time.perf_counter() - began) * 1000
    return first


async def through_ms(connection: Connection, seed: int) -> float:
    """Submit and stream, as a client does."""
    began = time.perf_counter()
    body = {"model_ref": "builtin:tiny", "prompt": PROMPT, "max_tokens": TOKENS, "seed": seed}
    task_id = json.loads(await connection.ask("POST", "/v1/tasks", json.dumps(body).encode()))["task_id"]
    await connection.send("GET", f"/v1/tasks/{task_id}/stream")
    first = 0.0
    async for part in connection.parts():
        if not first and b"event: token" in part:
            first = (time.perf_counter() - began) * 1000
    return first


async def main(rounds: int) -> None:
    spec = ReplicaSpec("bench-0", "bench", resolve("builtin:tiny"), slots=1, ctx=2048, threads=THREADS)
    worker = await LlamaCppEngine().launch(spec)
    direct, through = [], []
    try:
        await worker.ready()
        with tempfile.TemporaryDirectory() as folder:
            configuration = {"pools": [{"slots": 1}], "logs": {"level": "warning"}}
            async with a_service(configuration, Path(folder)) as served:
                await until_ready(served.client)
                connection = Connection(str(served.client.base_url).rstrip("/"), {"Authorization": f"Bearer {TOKEN}"})
                for seed in range(rounds + 5):
                    pair = await direct_ms(worker, seed), await through_ms(connection, seed)
                    if seed >= 5:  # the first few warm caches up
                        direct.append(pair[0])
                        through.append(pair[1])
    finally:
        await worker.stop(1.0)
    added = [b - a for a, b in zip(direct, through, strict=True)]
    print(f"{rounds} rounds in turns, ms to the first token: minimum, median, maximum")
    for name, values in (("worker alone", direct), ("through the service", through), ("added, pair by pair", added)):
        print(f"{name:22} {min(values):8.2f} {statistics.median(values):8.2f} {max(values):8.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    asyncio.run(main(parser.parse_args().rounds))
