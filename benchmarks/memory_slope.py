"""Does the service's memory grow with the tasks that it has served?

    python benchmarks/memory_slope.py [--tasks 100000] [--clients 32]

Tiny tasks over HTTP on the simulated engine, which runs in the service itself: each is submitted, every other one's
stream is read to its end. Ended tasks are kept for one second. The resident size is read at equal numbers of tasks;
after the first fifth, a straight line through the medians of ten stretches says what 100,000 more would take.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lean import Connection, resident_bytes
from served import TOKEN, a_service, until_ready
from verdict import at_most

HEADERS = {"Authorization": f"Bearer {TOKEN}"}
PER_TASKS = 100_000
SLOPE_MAX_MB = 5.0
STRETCHES = 10


@dataclass(frozen=True)
class Slope:
    """Megabytes that 100,000 tasks add, and the standard error of that."""

    mb: float
    error_mb: float


def slope(samples: Sequence[tuple[int, int]]) -> Slope:
    """`samples`: tasks so far and resident bytes. Medians of stretches, since what is resident at one moment jumps with
    what runs, and neighbours are much alike. Needs three samples."""
    size = max(1, len(samples) // STRETCHES)
    stretches = [samples[start : start + size] for start in range(0, len(samples) - size + 1, size)]
    points = [(statistics.mean(t for t, _ in part), statistics.median(b for _, b in part)) for part in stretches]
    if len(points) < 3:
        raise ValueError("a slope needs three samples")
    xs, ys = zip(*points, strict=True)
    line = statistics.linear_regression(xs, ys)
    off = sum((y - line.intercept - line.slope * x) ** 2 for x, y in points) / (len(points) - 2)
    spread = sum((x - statistics.mean(xs)) ** 2 for x in xs)
    unit = PER_TASKS / 1e6
    return Slope(line.slope * unit, (off / spread) ** 0.5 * unit)


class Load:
    """Clients that submit until the number is reached."""

    def __init__(self, address: str, tasks: int) -> None:
        self._address, self._left = address, tasks
        self.done = 0

    async def client(self) -> None:
        connection = Connection(self._address, HEADERS)
        body = {"model_ref": "builtin:tiny", "prompt": "Once", "max_tokens": 1, "determinism": "best_effort"}
        encoded = json.dumps(body).encode()
        while self._left > 0:
            self._left -= 1
            answer = await connection.ask("POST", "/v1/tasks", encoded)
            if connection.status != 202:
                raise RuntimeError(f"not admitted: {answer!r}")
            if self._left % 2:
                await connection.ask("GET", f"/v1/tasks/{json.loads(answer)['task_id']}/stream")
            self.done += 1
        connection.close()


async def main(tasks: int, clients: int) -> None:
    configuration = {
        "devices": [{"id": "imaginary", "backend": "simulated", "vram_bytes": 24 * 2**30}],
        "pools": [{"engine": "simulated", "slots": 64, "queue": {"capacity": 10_000}}],
        "tasks": {"retain_ms": 1000},
        "logs": {"level": "error"},
    }
    samples: list[tuple[int, int]] = []
    with tempfile.TemporaryDirectory() as folder:
        async with a_service(configuration, Path(folder)) as served:
            await until_ready(served.client)
            load = Load(str(served.client.base_url).rstrip("/"), tasks)
            began = time.perf_counter()
            working = [asyncio.ensure_future(load.client()) for _ in range(clients)]
            step = max(1, tasks // 200)
            while not all(client.done() for client in working):
                if load.done >= (samples[-1][0] if samples else 0) + step:
                    samples.append((load.done, resident_bytes(served.pid)))
                await asyncio.sleep(0.02)
            await asyncio.gather(*working)
            took = time.perf_counter() - began
            samples.append((load.done, resident_bytes(served.pid)))
    later = [one for one in samples if one[0] >= tasks / 5]
    found = slope(later)
    print(f"{tasks} tasks in {took:.0f} s ({tasks / took:.0f}/s)\n\n| tasks | resident, MiB |\n| --- | --- |")
    for count, resident in samples[:: max(1, len(samples) // 10)]:
        print(f"| {count} | {resident / 2**20:.1f} |")
    print(f"\n{at_most(f'memory by {PER_TASKS:,} tasks (± {found.error_mb:.1f} MB)', found.mb, SLOPE_MAX_MB, ' MB')}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=100_000)
    parser.add_argument("--clients", type=int, default=32)
    given = parser.parse_args()
    asyncio.run(main(given.tasks, given.clients))
