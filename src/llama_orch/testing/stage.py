"""The real core and runtime on an imaginary machine, for a virtual-time loop.

This is the one module of the simulations that knows how the service is put together.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from llama_orch.clock import LoopClock
from llama_orch.contract.config import PoolSettings, Settings
from llama_orch.core.scheduler import Scheduler
from llama_orch.runtime.orchestrator import Orchestrator
from llama_orch.runtime.plan import make_plan
from llama_orch.runtime.service import LocalService
from llama_orch.runtime.wiring import wire
from llama_orch.testing.builders import DIGEST
from llama_orch.testing.machine import Machine


@dataclass(frozen=True, slots=True)
class Stage:
    """A running simulation."""

    machine: Machine
    service: LocalService
    orchestrator: Orchestrator

    @property
    def scheduler(self) -> Scheduler:
        return self.orchestrator.scheduler


def settings_of(pools: Sequence[PoolSettings], **sections: object) -> Settings:
    """Settings with these pools, all on the simulated engine; with none of them where all models come on demand."""
    simulated = [msgspec.structs.replace(pool, engine="simulated") for pool in pools]
    return msgspec.structs.replace(Settings(), pools=simulated, **sections)


@asynccontextmanager
async def on_stage(
    settings: Settings, machine: Machine, prepare: Callable[[Stage], None] | None = None
) -> AsyncIterator[Stage]:
    """The service at work until the block is left. `prepare` sees it before anything happens."""
    engines = {"simulated": machine.engine}
    plan = make_plan(settings, engines, machine.sources, machine.library)
    orchestrator, service = wire(settings, engines, plan, _digest, LoopClock())
    stage = Stage(machine, service, orchestrator)
    if prepare is not None:
        prepare(stage)
    running = asyncio.ensure_future(orchestrator.run())
    running.set_name("orchestrator")
    try:
        await asyncio.sleep(0)
        yield stage
    finally:
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running


async def _digest(path: Path) -> str:
    return DIGEST
