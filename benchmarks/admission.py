"""Processor time for each admitted task, against Connexion's bare one.

    python benchmarks/admission.py [--requests 1500] [--rounds 5]

Ours is everything that POST /v1/tasks does: the token is checked, the body checked against the contract, the prompt
counted by a worker in its process (paced_server.py), the task queued behind those that wait, its start foretold, its
stream opened, its log line written. The other side is Connexion as it comes, with the same contract and a handler that
returns at once (stock_connexion.py). Eight clients at a time, in turns; microseconds of the server process by request.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
from pathlib import Path

from lean import Connection, cpu_s
from paced_server import paced_engine
from relay import HEADERS, Server, stock
from served import a_service, until_ready
from verdict import against

CLIENTS = 8
BODY = json.dumps(
    {
        "model_ref": "builtin:tiny",
        "prompt": "Once upon a time, in a little house by the sea, there lived a girl who had a kite.",
        "max_tokens": 64,
        "seed": 7,
        "priority": "interactive",
        "sampling": {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "stop": ["END"]},
    }
).encode()


async def us_per_request(server: Server, requests: int) -> tuple[float, list[str]]:
    """And the tasks that were made."""
    made: list[str] = []
    left = iter(range(requests))

    async def client() -> None:
        connection = Connection(server.address, HEADERS)
        for _ in left:
            answer = json.loads(await connection.ask("POST", "/v1/tasks", BODY))
            made.append(answer["task_id"])
        connection.close()

    began = cpu_s(server.pid)
    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return 1e6 * (cpu_s(server.pid) - began) / requests, made


async def clear(server: Server, tasks: list[str]) -> None:
    connection = Connection(server.address, HEADERS)
    for task_id in tasks:
        await connection.ask("POST", f"/v1/tasks/{task_id}/cancel")
    connection.close()


async def main(requests: int, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        configuration = {
            "pools": [{"slots": 1, "queue": {"capacity": 100_000}}],
            "engines": paced_engine(folder, 1.0),
            "logs": {"level": "info"},
        }
        async with a_service(configuration, folder) as served, stock(1.0) as other:
            await until_ready(served.client)
            ours = Server(str(served.client.base_url).rstrip("/"), served.pid)
            found: dict[str, list[float]] = {"the service": [], "bare Connexion": []}
            for turn in range(rounds + 1):  # the first one warms up
                us, made = await us_per_request(ours, requests)
                await clear(ours, made)
                bare_us, _ = await us_per_request(other, requests)
                if turn:
                    found["the service"].append(us)
                    found["bare Connexion"].append(bare_us)
    print(f"POST /v1/tasks, {rounds} rounds of {requests} requests by {CLIENTS} clients: CPU by request, µs")
    print("\n".join(against(found, 0)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    asyncio.run(main(given.requests, given.rounds))
