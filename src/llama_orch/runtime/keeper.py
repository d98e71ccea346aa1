"""Keeps the fleet as the core decides: loads and unloads workers, reports what becomes of them, watches the devices."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from llama_orch.clock import Clock
from llama_orch.contract.models import ReplicaState
from llama_orch.core.effects import Condemn, Dispose, Load, Unload
from llama_orch.core.pool import Pool
from llama_orch.core.replica import Replica
from llama_orch.core.scheduler import Scheduler
from llama_orch.devices.inventory import Source
from llama_orch.engines.base import WorkerFacts
from llama_orch.observe.journal import Journal
from llama_orch.runtime.builder import Builder, calibration_key, spec_as_found
from llama_orch.runtime.decoding import Spawn
from llama_orch.runtime.measure import Differences, measured_bytes
from llama_orch.runtime.replicas import Listener, Replicas

log = logging.getLogger("llama_orch.keeper")

DEVICES_FRESH_S = 0.25
CARDS_LOOK_S = 5.0  # at cards, while nothing happens: one gets lost without a sound
# Drivers give memory back some time after its process has ended (0.5 to 1.5 s were seen by others).
MEMORY_BACK_LIMIT_S = 5.0
MEMORY_BACK_POLL_S = 0.25
MEMORY_BACK_SHARE = 0.75  # of what a replica took: the rest is within the error of what it was thought to take


class Keeper:
    """`perform` is called after each report to the scheduler; `wake` lets the keeper of time look again; `loaded` hears
    of a pool and the digest of the file that its worker has loaded."""

    def __init__(
        self,
        scheduler: Scheduler,
        replicas: Replicas,
        builder: Builder,
        journal: Journal,
        clock: Clock,
        spawn: Spawn,
        perform: Callable[[], None],
        wake: Callable[[], None],
        loaded: Callable[[Pool, str], None],
    ) -> None:
        self._scheduler = scheduler
        self._replicas = replicas
        self._builder = builder
        self._journal = journal
        self._clock = clock
        self._spawn = spawn
        self._perform = perform
        self._wake = wake
        self._loaded = loaded
        self._devices_fresh_until = 0.0
        self._differences = Differences()
        replicas.listen(
            Listener(
                self._ready, self._lost, scheduler.replica_explained, self._unloaded, self._gone, self._memory_back
            )
        )

    # -- effects -------------------------------------------------------------------------------------------------------

    def load_configured(self) -> None:
        """The start: every replica that is to be there from the beginning."""
        for replica in list(self._scheduler.replicas.values()):
            if replica.state is ReplicaState.LOADING:
                replica.loading_since_s = self._clock.now()
                self._load(replica.replica_id)

    def perform(self, effect: Load | Unload | Condemn | Dispose) -> None:
        match effect:
            case Load(replica_id):
                self._load(replica_id)
            case Unload(replica_id, reason):
                replica = self._scheduler.replicas[replica_id]
                self._journal.replica_unloading(replica, self._scheduler.fleet.owner(replica), reason)
                self._replicas.unload(replica_id)
            case Condemn(replica_id, reason):
                self._replicas.condemn(replica_id, reason)
            case Dispose(replica_id):
                self._replicas.discard(replica_id)

    def _load(self, replica_id: str) -> None:
        replica = self._scheduler.replicas[replica_id]
        self._replicas.resize(replica_id, replica.slots)
        self._differences.begin(replica_id, self._mask(replica))
        self._spawn(self._replicas.live(replica_id), f"replica {replica_id}")

    # -- what becomes of workers ---------------------------------------------------------------------------------------

    def _ready(self, replica_id: str, facts: WorkerFacts, digest: str | None) -> None:
        replica = self._scheduler.replicas[replica_id]
        pool = self._scheduler.fleet.owner(replica)
        if digest is None:
            pool.spec = spec_as_found(pool.spec, facts)
        else:
            self._measure(replica, pool, facts, digest)
            self._loaded(pool, digest)  # before a task starts on it
        self._scheduler.replica_ready(replica_id, slots=facts.slots, model_digest=digest, now=self._clock.now())
        self._journal.replica_ready(replica, pool, facts.load_ms, dict(facts.buffer_bytes))
        self._perform()
        self._wake()

    def _measure(self, replica: Replica, pool: Pool, facts: WorkerFacts, digest: str) -> None:
        """What it takes is known now: for the ledger, and for the next load of the same."""
        mask = self._mask(replica)
        measured = measured_bytes(
            mask,
            facts,
            lambda source: self._differences.of(
                replica.replica_id, source, replica.need_bytes.get(source.device.device_id, 0)
            ),
        )
        self._differences.loaded(replica.replica_id, replica.device_ids)
        calibration, predicted = self._builder.calibration, sum(replica.need_bytes.values())
        if calibration is not None and predicted and measured.keys() == set(replica.device_ids):
            key = calibration_key(digest, pool.spec.engine_version, pool.spec.ctx, replica.slots, mask[0])
            try:
                calibration.record(key, predicted, sum(measured.values()))
            except OSError as error:  # a full disk costs the next start a forecast, not this one its model
                log.warning("what %s takes could not be remembered: %s", replica.replica_id, error)
        self._scheduler.fleet.measured(replica.replica_id, measured)

    def _mask(self, replica: Replica) -> list[Source]:
        return [self._builder.sources[device_id] for device_id in replica.device_ids]

    def _lost(self, replica_id: str, reason: str, is_shortage: bool) -> None:
        now = self._clock.now()
        replica = self._scheduler.replicas[replica_id]
        pool = self._scheduler.fleet.owner(replica)
        self._differences.end(replica_id, replica.device_ids)
        self._scheduler.replica_lost(replica_id, reason, now, is_shortage=is_shortage, is_gone=False)
        self._journal.replica_lost(replica, pool, reason, now)
        self._perform()
        self._wake()

    def _unloaded(self, replica_id: str) -> None:
        replica = self._scheduler.replicas.get(replica_id)
        if replica is not None:
            self._differences.end(replica_id, replica.device_ids)
            self._look_now()
            self._scheduler.replica_unloaded(replica_id, self._clock.now())
        self._perform()
        self._wake()

    def _gone(self, replica_id: str) -> None:
        self._look_now()
        self._scheduler.replica_gone(replica_id, self._clock.now())
        self._perform()
        self._wake()

    async def _memory_back(self, replica_id: str) -> None:
        """Wait until the driver counts most of a replica's memory as free again; not for ever, since what it counts
        depends on others as well."""
        replica = self._scheduler.replicas.get(replica_id)
        cards = [] if replica is None else [source for source in self._mask(replica) if source.backend == "cuda"]
        if replica is None or not cards:
            return
        began = self._clock.now()
        while not all(self._is_back(source, replica) for source in cards):
            if self._scheduler.is_draining:  # the service ends: nobody is to have it
                return
            if self._clock.now() - began >= MEMORY_BACK_LIMIT_S:
                log.warning("the memory of %s did not return within %.0f s", replica_id, MEMORY_BACK_LIMIT_S)
                return
            await asyncio.sleep(MEMORY_BACK_POLL_S)
        log.info("the memory of %s was back after %.2f s", replica_id, self._clock.now() - began)

    def _is_back(self, source: Source, replica: Replica) -> bool:
        ledger, device = self._scheduler.fleet.ledger, source.device
        need = replica.need_bytes.get(device.device_id, 0)
        own = need if replica.holds_memory else 0
        others = ledger.held_bytes(device.device_id) - own + device.external_bytes
        return source.read_free_bytes() >= device.vram_total_bytes - others - (1 - MEMORY_BACK_SHARE) * need

    # -- devices -------------------------------------------------------------------------------------------------------

    @property
    def look_again_s(self) -> float | None:
        """How long nobody may look at the devices; None where there is nothing to see."""
        return CARDS_LOOK_S if any(s.read_card is not None for s in self._builder.sources.values()) else None

    def look_at_devices(self) -> None:
        """What is free on each device, for placement, as of the last moments."""
        if self._clock.now() >= self._devices_fresh_until:
            self._look_now()

    def _look_now(self) -> None:
        """A device that cannot be read keeps its last figure."""
        self._devices_fresh_until = self._clock.now() + DEVICES_FRESH_S
        for source in self._builder.sources.values():
            try:
                self._see(source)
            except OSError as error:  # no descriptor left, for example: no reason to end the service
                log.warning("device %s could not be read: %s", source.device.device_id, error)

    def _see(self, source: Source) -> None:
        problem = source.read_problem()
        is_lost = source.read_card is not None and source.read_card().is_lost
        free, now = source.read_free_bytes(), self._clock.now()
        self._scheduler.device_seen(source.device.device_id, free, now, problem, is_lost=is_lost)
