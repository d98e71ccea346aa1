"""The real core and runtime on an imaginary machine, for a virtual-time loop.

This is the one module of the simulations that knows how the service is put together and what it has: everything else
asks here. What the core at hand lacks (drain and reload of a pool, a ledger of the devices) is None or False here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from llama_orch.clock import LoopClock
from llama_orch.contract.config import PoolSettings, Settings
from llama_orch.core.pool import Device, Pool, PoolSpec, Replica
from llama_orch.core.queue import TaskQueue
from llama_orch.core.scheduler import Scheduler
from llama_orch.devices.inventory import Source
from llama_orch.engines.base import ReplicaSpec
from llama_orch.runtime.orchestrator import Orchestrator
from llama_orch.runtime.plan import Plan
from llama_orch.runtime.service import LocalService
from llama_orch.runtime.wiring import wire
from llama_orch.testing.builders import DIGEST
from llama_orch.testing.machine import Machine

RESERVE_BYTES = 256 * 2**20  # of every device, as runtime.fit has it
HAS_ON_DEMAND = False

PoolAct = Callable[[str, int], Awaitable[object]]
PoolReload = Callable[[str, str], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class Stage:
    """A running simulation."""

    machine: Machine
    service: LocalService
    orchestrator: Orchestrator

    @property
    def scheduler(self) -> Scheduler:
        return self.orchestrator.scheduler

    @property
    def drain_pool(self) -> PoolAct | None:
        """Pool id, milliseconds."""
        return getattr(self.service, "drain_pool", None)

    @property
    def reload_pool(self) -> PoolReload | None:
        """Pool id, model reference."""
        return getattr(self.service, "reload_pool", None)

    def reserved_bytes(self, device: Device) -> int | None:
        """What the core's ledger has given to replicas; None where it keeps none."""
        return getattr(device, "vram_reserved_bytes", None)


def settings_of(pools: list[PoolSettings], **sections: object) -> Settings:
    simulated = [msgspec.structs.replace(pool, engine="simulated") for pool in pools]
    return msgspec.structs.replace(Settings(), pools=simulated, **sections)


@asynccontextmanager
async def on_stage(
    settings: Settings, machine: Machine, prepare: Callable[[Stage], None] | None = None
) -> AsyncIterator[Stage]:
    """The service at work until the block is left. `prepare` sees it before anything happens."""
    engines = {"simulated": machine.engine}
    plan = _plan(settings, machine)
    orchestrator, service = wire(settings, engines, machine.sources, plan, _digest, LoopClock())
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


def _plan(settings: Settings, machine: Machine) -> Plan:
    """As runtime.plan.make_plan, with the machine's library in the place of files."""
    plan = Plan([], [source.device for source in machine.sources], {})
    free = {source.device.device_id: source.device.vram_total_bytes - RESERVE_BYTES for source in machine.sources}
    for pool in settings.pools:
        specs = [_replica_spec(pool, machine, mask) for mask in _masks(pool, machine.sources)]
        fitting = [_claim(machine, spec, free) for spec in specs]
        if pool.replicas == "auto" and any(fitting):
            specs = [spec for spec, fits in zip(specs, fitting, strict=True) if fits]
            fitting = [True] * len(specs)
        replicas: dict[str, Replica] = {}
        for number, (spec, fits) in enumerate(zip(specs, fitting, strict=True)):
            replica = Replica(f"{pool.id}-{number}", pool.id, spec.device_uuids, pool.slots)
            if not fits:
                replica.refuse(f"{pool.model} does not fit {', '.join(spec.device_uuids)}")
            replicas[replica.replica_id] = replica
            plan.replicas[replica.replica_id] = (machine.engine, replace(spec, replica_id=replica.replica_id))
        plan.pools.append(Pool(_spec(pool, machine), TaskQueue(pool.queue.capacity, pool.queue.full_policy), replicas))
    return plan


def _masks(pool: PoolSettings, sources: list[Source]) -> list[list[Source]]:
    by_id = {source.device.device_id: source for source in sources}
    usable = list(sources) if pool.devices == "auto" else [by_id[device_id] for device_id in pool.devices]
    if pool.tensor_split is not None:
        return [usable]
    count = len(usable) if pool.replicas == "auto" else pool.replicas
    return [[usable[number % len(usable)]] for number in range(count)]


def _replica_spec(pool: PoolSettings, machine: Machine, mask: list[Source]) -> ReplicaSpec:
    return ReplicaSpec(
        replica_id="",
        pool_id=pool.id,
        model_path=machine.shelf.look(pool.model).path,
        slots=pool.slots,
        ctx=pool.ctx,
        backend="simulated",
        device_uuids=tuple(source.device.device_id for source in mask),
        tensor_split=tuple(pool.tensor_split or ()),
    )


def _claim(machine: Machine, spec: ReplicaSpec, free: dict[str, int]) -> bool:
    parts = {device_id: machine.share_bytes(spec, device_id) for device_id in spec.device_uuids}
    fits = all(part <= free[device_id] for device_id, part in parts.items())
    for device_id, part in parts.items():
        free[device_id] -= part if fits else 0
    return fits


def _spec(pool: PoolSettings, machine: Machine) -> PoolSpec:
    traits = machine.engine.traits
    return PoolSpec(
        pool_id=pool.id,
        engine=pool.engine,
        engine_version=traits.version,
        model=pool.model,
        workloads=traits.workloads,
        features=traits.features,
        slots=pool.slots,
        ctx=pool.ctx,
        max_tokens=pool.max_tokens,
        sampler_profile_version=pool.sampler_profile_version,
        queue_capacity=pool.queue.capacity,
        full_policy=pool.queue.full_policy,
        strict_needs_exclusive=traits.strict_needs_exclusive,
    )
