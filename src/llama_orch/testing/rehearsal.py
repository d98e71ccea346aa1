"""The whole service on the simulated engine, for a virtual-time loop: everything but the process around it.

async with a_rehearsal(settings) as stage:
    task = await stage.service.submit(a_task())
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from llama_orch.clock import LoopClock
from llama_orch.contract.config import PoolSettings, Settings
from llama_orch.core.ledger import Device
from llama_orch.devices.inventory import Source
from llama_orch.engines.simulated import ServiceModel, SimulatedEngine, SimulatedWorker
from llama_orch.runtime.orchestrator import Orchestrator
from llama_orch.runtime.plan import make_plan
from llama_orch.runtime.service import LocalService
from llama_orch.runtime.streams import Reader
from llama_orch.runtime.wiring import wire
from llama_orch.stores.artifacts import ArtifactStore
from llama_orch.testing.builders import DIGEST, a_device


@dataclass(frozen=True, slots=True)
class Stage:
    """A running rehearsal."""

    service: LocalService
    orchestrator: Orchestrator
    engine: SimulatedEngine

    def worker(self, replica_id: str = "default-0") -> SimulatedWorker:
        return self.engine.workers[replica_id]


def settings_for(*pools: PoolSettings, **sections: object) -> Settings:
    """Settings with these pools, all on the simulated engine."""
    simulated = [msgspec.structs.replace(pool, engine="simulated") for pool in pools or (PoolSettings(),)]
    return msgspec.structs.replace(Settings(), pools=simulated, **sections)


def sources_for(cards: Sequence[str]) -> list[Source]:
    return [_source(a_device(card)) for card in cards]


def _source(device: Device) -> Source:
    return Source(device, "simulated", None, lambda: device.vram_free_bytes)


@asynccontextmanager
async def a_rehearsal(
    settings: Settings | None = None,
    *,
    model: ServiceModel | None = None,
    cards: Sequence[str] = ("3090",),
    is_loaded: bool = True,
    engine: SimulatedEngine | None = None,
    artifacts: ArtifactStore | None = None,
) -> AsyncIterator[Stage]:
    """The service at work, until the block is left; then every task of it is gone. It begins when every replica is
    ready, or at the start of their loading. `engine` in place of one with the model's figures."""
    settings = settings_for() if settings is None else settings
    model = ServiceModel() if model is None else model
    engine = SimulatedEngine(model) if engine is None else engine
    sources = sources_for(cards)
    plan = make_plan(settings, {"simulated": engine}, sources)
    orchestrator, service = wire(settings, {"simulated": engine}, plan, _digest, LoopClock(), artifacts=artifacts)
    running = asyncio.ensure_future(orchestrator.run())
    try:
        await asyncio.sleep(model.load_s + 0.001 if is_loaded else 0)
        yield Stage(service, orchestrator, engine)
    finally:
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running


async def _digest(path: Path) -> str:
    return DIGEST


async def read_all(reader: Reader) -> bytes:
    """Every frame until the last, as they go over the wire."""
    parts: list[bytes] = []
    try:
        while (batch := await reader.batch()) is not None:
            parts.append(batch)
    finally:
        reader.close()
    return b"".join(parts)
