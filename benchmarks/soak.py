"""A long mixed load, and then: has anything leaked?

    python benchmarks/soak.py [--minutes 30] [--seed 1] [--clients 6] [--kill-every 45]

Both engines with real workers. Clients submit and read, cancel in the middle, set deadlines that cannot be met, leave
streams and come back, converse in sessions, speak OpenAI's dialect, and leave that too; and a worker is killed with
SIGKILL every now and then. What a client does is drawn from the seed. After a warm-up (a fifth of the time, two minutes
at most), and again at the end, the load pauses until all that is kept for a time is gone; what was open then is held
against each other: descriptors, threads, processes; no task may wait or run, no slot be busy, no stream be open.
Memory is the slope over the samples in between. Prints a table; ends with 1 on a leak, or when a request was answered
with 500.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from lean import resident_bytes
from memory_slope import SLOPE_MAX_MB, slope
from peers import family
from served import Served, a_service
from soak_clients import Client

RETAIN_S, SESSION_TTL_S = 3.0, 10.0
QUIET_S = 90.0
SAMPLE_S = 1.0
# A connection that httpx or the service's pool keeps for a moment, and the threads of asyncio's default executor.
FDS_SLACK, THREADS_SLACK = 4, 6
GAUGES = ("queue_depth", "slots_busy", "streams_open")

CONFIGURATION: dict[str, Any] = {
    "pools": [
        {"id": "llamacpp", "engine": "llamacpp", "slots": 4, "ctx": 512, "replicas": 1, "queue": {"capacity": 8}},
        {"id": "ctransformers", "engine": "ctransformers", "slots": 1, "ctx": 512, "replicas": 1},
    ],
    "tasks": {"retain_ms": int(RETAIN_S * 1000)},
    "sessions": {"ttl_ms": int(SESSION_TTL_S * 1000)},
    "logs": {"level": "warning"},
}


@dataclass(frozen=True)
class State:
    """What the service has open when nobody asks anything of it."""

    descriptors: int
    threads: int
    processes: int
    resident_mib: float
    gauges: dict[str, float]


@dataclass
class Soak:
    served: Served
    seed: int
    counts: Counter[str] = field(default_factory=Counter)
    kills: int = 0
    samples: list[tuple[int, int]] = field(default_factory=list)

    @property
    def tasks(self) -> int:
        return sum(self.counts.values())

    async def load(self, seconds: float, clients: int, kill_every_s: float, phase: str) -> None:
        """Clients for so long, then until each has ended what it was at."""
        until = time.monotonic() + seconds
        address = str(self.served.client.base_url).rstrip("/")
        made = [Client(address, random.Random(f"{self.seed} {phase} {n}"), self.counts) for n in range(clients)]
        others = [asyncio.ensure_future(self._kill(kill_every_s, phase)), asyncio.ensure_future(self._sample())]
        try:
            await asyncio.gather(*(client.run(until) for client in made))
        finally:
            for other in others:
                other.cancel()
            await asyncio.gather(*others, return_exceptions=True)

    async def _sample(self) -> None:
        while True:
            await asyncio.sleep(SAMPLE_S)
            self.samples.append((self.tasks, resident_bytes(self.served.pid)))

    async def _kill(self, every_s: float, phase: str) -> None:
        dice = random.Random(f"{self.seed} {phase} kills")
        while True:
            await asyncio.sleep(every_s * dice.uniform(0.5, 1.5))
            alive = workers(self.served.pid)
            if alive:
                try:
                    os.kill(dice.choice(alive), signal.SIGKILL)
                except ProcessLookupError:
                    continue  # it ended by itself meanwhile
                self.kills += 1

    async def quiet(self) -> State:
        """Wait until nothing runs and nothing is kept any more; what is open then."""
        deadline = time.monotonic() + QUIET_S
        while True:
            gauges = await busy(self.served.client)
            pools = (await self.served.client.get("/v1/pools")).raise_for_status().json()["items"]
            if not any(gauges.values()) and all(pool["ready"] for pool in pools):
                break
            if time.monotonic() > deadline:
                break  # the state says what is left
            await asyncio.sleep(0.2)
        await asyncio.sleep(RETAIN_S + SESSION_TTL_S + 2)
        pid = self.served.pid
        return State(
            len(os.listdir(f"/proc/{pid}/fd")),
            len(os.listdir(f"/proc/{pid}/task")),
            len(family(pid)) + len(workers(pid)),
            resident_bytes(pid) / 2**20,
            await busy(self.served.client),
        )


def workers(pid: int) -> list[int]:
    """The processes of the engines: children of the service, each in a session of its own."""
    session, found = os.getsid(pid), []
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            children = [int(child) for child in (task / "children").read_text().split()]
            found += [child for child in children if os.getsid(child) != session]
        except (FileNotFoundError, ProcessLookupError):
            continue  # that thread or child has just ended
    return sorted(found)


async def busy(client: httpx.AsyncClient) -> dict[str, float]:
    """The gauges that have to come back to 0, each summed over its labels."""
    text = (await client.get("/metrics")).raise_for_status().text
    found = {}
    for name in GAUGES:
        values = re.findall(rf"^(?:[a-z]+_)?{name}(?:\{{[^}}]*\}})? (\S+)$", text, re.MULTILINE)
        if not values:
            raise RuntimeError(f"/metrics has no {name}")
        found[name] = sum(map(float, values))
    return found


def judged(soak: Soak, before: State, after: State) -> tuple[list[str], list[str]]:
    """The table, and the leaks."""
    found = slope(soak.samples)
    rows = [
        ("descriptors", before.descriptors, after.descriptors, before.descriptors + FDS_SLACK),
        ("threads", before.threads, after.threads, before.threads + THREADS_SLACK),
        ("processes", before.processes, after.processes, before.processes),
        *((name, before.gauges[name], after.gauges[name], 0) for name in GAUGES),
    ]
    lines = ["| | after the warm-up | at the end | at most |", "| --- | --- | --- | --- |"]
    lines += [f"| {name} | {first:g} | {last:g} | {bound:g} |" for name, first, last, bound in rows]
    lines.append(f"| resident, MiB | {before.resident_mib:.1f} | {after.resident_mib:.1f} | - |")
    lines.append(f"| MB by 100,000 tasks | - | {found.mb:.1f} ± {found.error_mb:.1f} | {SLOPE_MAX_MB:g} |")
    leaks = [f"{name}: {last:g}, at most {bound:g}" for name, _, last, bound in rows if last > bound]
    # A short run says little about 100,000 tasks: it is a leak when chance does not explain it.
    if found.mb - 2 * found.error_mb > SLOPE_MAX_MB:
        leaks.append(f"memory: {found.mb:.1f} ± {found.error_mb:.1f} MB by 100,000 tasks, at most {SLOPE_MAX_MB:g}")
    failures = {what: count for what, count in soak.counts.items() if "500" in what or "unexpected" in what}
    leaks += [f"{what}: {count}" for what, count in failures.items()]
    return lines, leaks


async def main(minutes: float, seed: int, clients: int, kill_every_s: float) -> int:
    warm_s = min(120.0, minutes * 60 / 5)
    with tempfile.TemporaryDirectory() as folder:
        async with a_service(CONFIGURATION, Path(folder)) as served:
            soak = Soak(served, seed)
            await soak.quiet()
            await soak.load(warm_s, clients, kill_every_s, "warm-up")
            before = await soak.quiet()
            soak.samples.clear()
            await soak.load(minutes * 60 - warm_s, clients, kill_every_s, "soak")
            after = await soak.quiet()
            lines, leaks = judged(soak, before, after)
    print(f"{minutes:g} minutes, seed {seed}: {soak.tasks} tasks, {soak.kills} workers killed\n")
    print("\n".join(lines))
    print("\n| what clients did, and what came of it | times |\n| --- | --- |")
    print("\n".join(f"| {what} | {count} |" for what, count in sorted(soak.counts.items())))
    print("\n" + ("\n".join(f"- missed: {leak}" for leak in leaks) or "- reached: no leak"))
    return int(bool(leaks))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--kill-every", type=float, default=45.0, help="seconds, on average")
    given = parser.parse_args()
    sys.exit(asyncio.run(main(given.minutes, given.seed, given.clients, given.kill_every)))
