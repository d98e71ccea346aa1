"""The measurements of cuda_split.py: memory, speed and a killed worker, on a card that is declared as two devices.

Whatever is waited for has a limit; what did not come in time is None in the figures, and no figure is made up for it.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
from cuda_report import MIB, Figures, Killed, Memory, Placed, Speed, Together
from prometheus_client.parser import text_string_to_metric_families
from served import Served, a_service

from llama_orch.devices.nvml import Card, Nvml, Reading
from llama_orch.models.gguf import read_gguf_header
from llama_orch.models.memory import LoadSettings, memory_need

DEVICES = {"large": 24 << 30, "small": 12 << 30}  # as an RTX 3090 and an RTX 3060 have
LOAD_LIMIT_S = 600.0
RETURN_LIMIT_S = 60.0
SLACK_BYTES = 64 * MIB  # what a card may lack and still count as given back
PROMPT = " ".join(f"w{number:x}" for number in range(128))  # words of the made-up vocabulary
ENDLESS_PROMPTS = 64  # in one task, for a stream that is to go on until it is cut off
POLL_S = 0.01
SCRAPE_S = 0.5


class MeasureFailed(Exception):
    """The service could not do what was to be measured."""


@dataclass(frozen=True)
class Load:
    """One model in service."""

    pool_id: str
    name: str
    path: Path
    ctx: int
    slots: int
    tokens: int = 256  # of one answer

    @property
    def reference(self) -> str:
        return f"file:{self.path}"

    def predicted_bytes(self) -> int:
        return memory_need(read_gguf_header(self.path), LoadSettings(self.ctx, self.slots, backend="cuda")).total_bytes

    def pool(self, devices: list[str] | str) -> dict[str, Any]:
        return {
            "id": self.pool_id, "model": self.reference, "ctx": self.ctx, "slots": self.slots, "devices": devices,
            "max_tokens": self.ctx // 2,
        }  # fmt: skip


@dataclass(frozen=True)
class Host:
    """The card, the program that computes on it, and a folder for the services' homes."""

    card: Card
    nvml: Nvml
    binary: Path
    folder: Path

    def reading(self) -> Reading:
        reading = self.nvml.read()[self.card.uuid]
        if reading.error is not None:
            raise MeasureFailed(f"the card cannot be read: {reading.error}")
        return reading

    def used_bytes(self) -> int:
        return self.reading().vram_used_bytes or 0

    def process_bytes(self, pids: Sequence[int]) -> int | None:
        told = self.reading().process_bytes or {}
        return sum(told[pid] for pid in pids) if pids and all(pid in told for pid in pids) else None

    def has_back(self, pid: int, used_bytes: int, memory_bytes: int, *, is_told: bool) -> bool:
        """Whether what a process that was killed had is the card's again. By the process's own entry where the driver
        tells those: the next process may soon take as much. Else the card has to lack most of it no more."""
        reading = self.reading()
        if is_told:
            return reading.process_bytes is not None and pid not in reading.process_bytes
        return (reading.vram_used_bytes or 0) < used_bytes - memory_bytes // 2

    @asynccontextmanager
    async def serving(self, name: str, pools: list[dict[str, Any]]) -> AsyncIterator[Served]:
        configuration = {
            "devices": [{"id": one, "uuid": self.card.uuid, "vram_bytes": size} for one, size in DEVICES.items()],
            "engines": {"llamacpp": {"launcher": "binary", "binary": str(self.binary)}},
            "pools": pools,
            "logs": {"level": "info"},
        }
        async with a_service(configuration, self.folder / name) as served:
            await _within(LOAD_LIMIT_S, lambda: _have_settled(served, pools), "the models are not loaded")
            yield served


async def alone(host: Host, load: Load) -> tuple[Memory, list[Speed]]:
    """One replica on the large device: what it takes against what was predicted, one stream and all slots at once."""
    before = host.used_bytes()
    async with host.serving(load.pool_id, [load.pool(["large"])]) as served:
        (replica,) = await _replicas(served, load.pool_id)
        if replica["state"] != "ready":
            raise MeasureFailed(f"{load.name}: {replica['last_error'] or replica['state']}")
        loaded, process = host.used_bytes() - before, host.process_bytes(engine_pids(served.pid, load.path))
        load_s = load_seconds((await served.client.get("/metrics")).text, load.pool_id)
        speeds = [await _speed(served, load, count, load_s) for count in sorted({1, load.slots})]
        worked = host.used_bytes() - before
    returned_s = await _seconds_until(lambda: _now(host.used_bytes() - before < SLACK_BYTES))
    memory = Memory(
        load.name, load.ctx, load.slots, load.predicted_bytes(), replica["vram_reserved_bytes"], loaded, process,
        worked, returned_s,
    )  # fmt: skip
    return memory, speeds


async def together(host: Host, loads: Sequence[Load], figures: Figures) -> None:
    """All pools at once with `devices: auto`: where they were placed, what they take and give."""
    before = host.used_bytes()
    async with host.serving("together", [load.pool("auto") for load in loads]) as served:
        card_bytes = host.used_bytes() - before
        placed = [one for load in loads for one in await _placed(host, served, load)]
        figures.together = Together(DEVICES, placed, card_bytes, 0, 0.0)
        figures.together = await _under_load(served, loads, figures.together)


async def _under_load(served: Served, loads: Sequence[Load], found: Together) -> Together:
    """The same with streams on every slot, and the highest that GET /metrics said meanwhile."""
    seen: dict[tuple[str, str], float] = {}
    async with asyncio.TaskGroup() as group:
        scraper = group.create_task(_scrape(served.client, seen))
        began = time.perf_counter()
        counts = {load: len(await _ready(served, load.pool_id)) * load.slots for load in loads}
        streams = await _streams(served.client, counts)
        took_s = time.perf_counter() - began
        scraper.cancel()
    replicas = [
        replace(
            one,
            vram_used_bytes=seen.get(("vram_used_bytes", one.replica_id)),
            gpu_utilization=seen.get(("gpu_utilization", one.replica_id)),
        )
        for one in found.replicas
    ]
    return replace(found, replicas=replicas, streams=len(streams), total=sum(one.tokens for one in streams) / took_s)


async def killed(host: Host, loads: Sequence[Load]) -> Killed:
    """SIGKILL of an engine process while all its slots decode, beside a stream of another pool. The pool has this one
    replica, so that its streams are surely on it."""
    load, others = loads[0], loads[1:2]
    async with host.serving("killed", [load.pool(["large"]), *(one.pool("auto") for one in others)]) as served:
        pids = engine_pids(served.pid, load.path)
        if len(pids) != 1:
            raise MeasureFailed(f"{load.name} has {len(pids)} processes, not the one that is to be killed")
        told_bytes = host.process_bytes(pids)
        memory_bytes = load.predicted_bytes() if told_bytes is None else told_bytes
        gate = Gate(load.slots)
        async with asyncio.TaskGroup() as group:
            running = [group.create_task(stream(served.client, load, n, gate)) for n in range(gate.count)]
            await _within(LOAD_LIMIT_S, lambda: _now(gate.is_open), "the streams do not start")
            beside = [group.create_task(stream(served.client, one, 0)) for one in others]
            used = host.used_bytes()
            os.kill(pids[0], signal.SIGKILL)
            killed_at = time.perf_counter()
            is_told = told_bytes is not None
            back = group.create_task(
                _seconds_until(lambda: _now(host.has_back(pids[0], used, memory_bytes, is_told=is_told)))
            )
            again = group.create_task(_seconds_until(lambda: _is_back(served, load.pool_id), LOAD_LIMIT_S))
        ended = [one.result() for one in running]
        return Killed(
            load.name,
            memory_bytes,
            dict(Counter(one.code for one in ended)),
            max(one.ended_at for one in ended) - killed_at,
            back.result(),
            again.result(),
            all(one.result().code == "end" for one in beside) if beside else None,
        )


# --- streams ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stream:
    """One task as its client saw it. Times are perf_counter's."""

    code: str  # `end`, or the code of its error
    tokens: int
    first_s: float | None  # from the submission
    decode_s: float | None
    ended_at: float


class Gate:
    """Opens once `count` streams have had a few tokens."""

    TOKENS = 8

    def __init__(self, count: int) -> None:
        self.count = count
        self._decoding: set[int] = set()

    def note(self, seed: int, tokens: int) -> None:
        if tokens >= self.TOKENS:
            self._decoding.add(seed)

    @property
    def is_open(self) -> bool:
        return len(self._decoding) >= self.count


async def stream(client: httpx.AsyncClient, load: Load, seed: int, gate: Gate | None = None) -> Stream:
    """Submit a task and read it to its end; with a gate, one that goes on. Slots are shared: `strict` would leave all
    but one idle."""
    body: dict[str, Any] = {"model_ref": load.reference, "max_tokens": load.tokens, "seed": seed}
    body |= {"determinism": "best_effort"} | ({"inputs": [PROMPT] * ENDLESS_PROMPTS} if gate else {"prompt": PROMPT})
    began, first_s, tokens, event = time.perf_counter(), None, 0, ""
    answer = await client.post("/v1/tasks", json=body)
    if answer.status_code != 202:
        raise MeasureFailed(f"{load.name}: a task was refused: {answer.text}")
    async with client.stream("GET", f"/v1/tasks/{answer.json()['task_id']}/stream") as frames:
        async for line in frames.aiter_lines():
            if line.startswith("event: "):
                event = line.removeprefix("event: ")
            elif line.startswith("data: ") and event == "token":
                tokens += 1
                first_s = first_s or time.perf_counter() - began
                if gate is not None:
                    gate.note(seed, tokens)
            elif line.startswith("data: ") and event in ("end", "error"):
                data = json.loads(line.removeprefix("data: "))
                decode_s = data["decode_time_ms"] / 1000 if event == "end" else None
                code = "end" if event == "end" else data["code"]
                return Stream(code, data.get("tokens_out", tokens), first_s, decode_s, time.perf_counter())
    raise MeasureFailed(f"{load.name}: a stream broke off without its last frame")


async def _streams(client: httpx.AsyncClient, counts: dict[Load, int]) -> list[Stream]:
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(stream(client, load, seed)) for load, n in counts.items() for seed in range(n)]
    return [task.result() for task in tasks]


async def _speed(served: Served, load: Load, count: int, load_s: float | None) -> Speed:
    await _streams(served.client, {load: 1})  # the first one warms kernels up
    began = time.perf_counter()
    found = await _streams(served.client, {load: count})
    took_s = time.perf_counter() - began
    rates = [one.tokens / one.decode_s for one in found if one.decode_s]
    firsts = [one.first_s for one in found if one.first_s is not None]
    if not rates or not firsts:
        raise MeasureFailed(f"{load.name}: no stream had tokens: {Counter(one.code for one in found)}")
    total = sum(one.tokens for one in found) / took_s
    return Speed(load.name, load_s, count, statistics.median(firsts), statistics.median(rates), total)


# --- what the service says --------------------------------------------------------------------------------------------


async def _replicas(served: Served, pool_id: str) -> list[dict[str, Any]]:
    replicas: list[dict[str, Any]] = (await served.client.get(f"/v1/pools/{pool_id}/health")).json()["replicas"]
    return replicas


async def _ready(served: Served, pool_id: str) -> list[dict[str, Any]]:
    return [one for one in await _replicas(served, pool_id) if one["state"] == "ready"]


async def _have_settled(served: Served, pools: list[dict[str, Any]]) -> bool:
    """No replica is on its way any more, and some serve."""
    states = [one["state"] for pool in pools for one in await _replicas(served, pool["id"])]
    return "ready" in states and not {"loading", "unloading", "backoff"} & set(states)


async def _is_back(served: Served, pool_id: str) -> bool:
    """The replica that was lost serves again: it alone has a restart."""
    return any(one["restarts"] and one["state"] == "ready" for one in await _replicas(served, pool_id))


async def _placed(host: Host, served: Served, load: Load) -> list[Placed]:
    """The pool's replicas. Those of one model take the same, so it does not matter which process is whose."""
    pids = engine_pids(served.pid, load.path)
    by_replica = dict(zip((one["id"] for one in await _ready(served, load.pool_id)), pids, strict=False))
    return [
        Placed(
            one["id"], one["devices"], one["state"], one["last_error"], load.predicted_bytes(),
            one["vram_reserved_bytes"],
            host.process_bytes([by_replica[one["id"]]]) if one["id"] in by_replica else None,
            None, None,
        )
        for one in await _replicas(served, load.pool_id)
    ]  # fmt: skip


async def _scrape(client: httpx.AsyncClient, highest: dict[tuple[str, str], float]) -> None:
    while True:
        for found in gauges_by_replica((await client.get("/metrics")).text).items():
            highest[found[0]] = max(found[1], highest.get(found[0], 0.0))
        await asyncio.sleep(SCRAPE_S)


def gauges_by_replica(text: str) -> dict[tuple[str, str], float]:
    """The cards' two gauges by name and replica. Over several devices the bytes add up, and the busiest one counts."""
    found: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples if family.name in ("gpu_utilization", "vram_used_bytes") else ():
            key = (family.name, sample.labels["replica_id"])
            join = max if family.name == "gpu_utilization" else float.__add__
            found[key] = join(found.get(key, 0.0), float(sample.value))
    return found


def load_seconds(text: str, pool_id: str) -> float | None:
    """The mean of the pool's loads so far, by the service's own clock; None before the first."""
    samples = [one for family in text_string_to_metric_families(text) for one in family.samples]
    ours = [one for one in samples if one.labels.get("pool_id") == pool_id]
    total = sum(one.value for one in ours if one.name == "latency_load_ms_sum")
    count = sum(one.value for one in ours if one.name == "latency_load_ms_count")
    return total / count / 1000 if count else None


# --- processes and waits ----------------------------------------------------------------------------------------------


def engine_pids(service_pid: int, model: Path) -> list[int]:
    """Processes below the service that were given this model on their command line: the binary is, its wrapper not."""
    parents: dict[int, int] = {}
    given: list[int] = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except (FileNotFoundError, ProcessLookupError):
                continue  # it ended while we looked
            if b"--model" in words and os.fsencode(model) in words:
                given.append(int(entry.name))
    return sorted(pid for pid in given if _is_below(pid, service_pid, parents))


def _is_below(pid: int, ancestor: int, parents: dict[int, int]) -> bool:
    while pid in parents and pid != ancestor:
        pid = parents[pid]
    return pid == ancestor


async def _now(value: bool) -> bool:
    return value


async def _seconds_until(condition: Callable[[], Awaitable[bool]], limit_s: float = RETURN_LIMIT_S) -> float | None:
    """From now until it holds; None when it did not within the limit."""
    began = time.perf_counter()
    while not await condition():
        if time.perf_counter() - began > limit_s:
            return None
        await asyncio.sleep(POLL_S)
    return time.perf_counter() - began


async def _within(limit_s: float, condition: Callable[[], Awaitable[bool]], otherwise: str) -> None:
    if await _seconds_until(condition, limit_s) is None:
        raise MeasureFailed(f"{otherwise} within {limit_s:g} s")
