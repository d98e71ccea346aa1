"""From a pool's settings to its replicas: how many, on which devices, with how many slots, and what each will take.

A count of replicas is taken at its word, with as many slots as were asked for. `auto` puts one replica on each device
that can hold it with one slot at least; what is left over there goes into more slots, up to those that were asked for.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from msgspec import structs

from llama_orch.contract.config import PoolSettings
from llama_orch.contract.models import ReplicaState
from llama_orch.core.pool import Pool, PoolSpec
from llama_orch.core.queue import TaskQueue
from llama_orch.core.replica import Replica
from llama_orch.devices.inventory import Source
from llama_orch.engines.base import Engine, Offer, ReplicaSpec, WorkerFacts
from llama_orch.models.calibration import Calibration, CalibrationKey
from llama_orch.runtime.library import Library, Model

KV_TYPE = "f16"  # what our workers set


@dataclass(slots=True)
class Seat:
    """One replica to be: a place, a size, and what it takes of each device. `problem`: why it cannot be there."""

    mask: list[Source]
    slots: int
    need_bytes: dict[str, int]
    problem: str | None = None

    @property
    def backend(self) -> Literal["cuda", "cpu", "simulated", "remote"]:
        """Of its devices; a replica without any is on a server elsewhere."""
        return self.mask[0].backend if self.mask else "remote"


@dataclass(slots=True)
class Draft:
    """A pool to be. Its seats may still change."""

    settings: PoolSettings
    engine: Engine
    model: Model
    seats: list[Seat] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Built:
    """A pool, and how the workers of its replicas are launched."""

    pool: Pool
    workers: dict[str, tuple[Engine, ReplicaSpec]]


class Room:
    """Bytes that can be given away, by device; what is claimed is gone."""

    def __init__(self, free_bytes: Mapping[str, int]) -> None:
        self._free = dict(free_bytes)

    def lacks(self, need_bytes: Mapping[str, int]) -> tuple[str, int, int] | None:
        """The first device that has too little, what is needed of it, and what it has."""
        for device_id, need in need_bytes.items():
            if need > self._free[device_id]:
                return device_id, need, max(0, self._free[device_id])
        return None

    def claim(self, need_bytes: Mapping[str, int]) -> None:
        for device_id, need in need_bytes.items():
            self._free[device_id] -= need

    def beside(self, need_bytes: Mapping[str, int]) -> Room:
        """What is left beside that."""
        left = Room(self._free)
        left.claim(need_bytes)
        return left


class Builder:
    """Knows engines, devices and models. `digest_known`: a model file's digest, where it was read before."""

    def __init__(
        self,
        engines: Mapping[str, Engine],
        sources: Sequence[Source],
        library: Library,
        calibration: Calibration | None = None,
        digest_known: Callable[[Model], str | None] = lambda _: None,
    ) -> None:
        self.engines = engines
        self.sources = {source.device.device_id: source for source in sources}
        self.library = library
        self.calibration = calibration
        self.digest_known = digest_known
        self._numbers: dict[str, int] = {}  # of replicas that each pool has had
        self._on_cpu = 0  # replicas that stay loaded and compute on the CPU

    # -- needs ---------------------------------------------------------------------------------------------------------

    def need(self, draft: Draft, mask: Sequence[Source], slots: int) -> dict[str, int]:
        """What a replica takes of each of its devices; nothing where nobody knows."""
        total = None if not mask else draft.model.need(draft.settings.ctx, slots, mask[0].backend)
        if total is None:
            return {}
        total = self._corrected(total, draft, mask[0], slots)
        shares = draft.settings.tensor_split or [1.0] * len(mask)
        ids = [source.device.device_id for source in mask]
        return {d: round(total * share / sum(shares)) for d, share in zip(ids, shares, strict=True)}

    def _corrected(self, total: int, draft: Draft, source: Source, slots: int) -> int:
        digest = None if self.calibration is None else self.digest_known(draft.model)
        if self.calibration is None or digest is None:
            return total
        version = draft.engine.traits.version
        return self.calibration.corrected(total, calibration_key(digest, version, draft.settings.ctx, slots, source))

    # -- seats ---------------------------------------------------------------------------------------------------------

    def draft(self, settings: PoolSettings, model: Model) -> Draft:
        """What a server elsewhere has is its own, whatever is said of the pool."""
        there = model.elsewhere
        if there is not None:
            settings = structs.replace(settings, slots=there.slots, ctx=there.ctx)
        return Draft(settings, self.engines[settings.engine], model)

    def seat(self, draft: Draft, room: Room, *, claim: bool = True) -> None:
        """Find the places of the draft's replicas: `auto` with one slot each for now."""
        settings = draft.settings
        if draft.model.elsewhere is not None:
            draft.seats.append(Seat([], settings.slots, {}))
            return
        is_auto = settings.replicas == "auto"
        for mask in self._masks(settings):
            slots = 1 if is_auto else self._slots_asked(draft)
            seat = Seat(mask, slots, self.need(draft, mask, slots))
            lack = room.lacks(seat.need_bytes)
            if lack is not None:
                seat.problem = _does_not_fit(settings, slots, *lack)
            elif claim:
                room.claim(seat.need_bytes)
            draft.seats.append(seat)
        if is_auto and any(seat.problem is None for seat in draft.seats):
            draft.seats = [seat for seat in draft.seats if seat.problem is None]

    def widen(self, draft: Draft, room: Room, *, claim: bool = True) -> bool:
        """One more slot for each replica of an `auto` pool that has room for it; False when none had."""
        has_grown = False
        for seat in draft.seats if draft.settings.replicas == "auto" else ():
            if seat.problem is not None or seat.slots >= self._slots_asked(draft) or not seat.mask:
                continue
            wider = self.need(draft, seat.mask, seat.slots + 1)
            more = {d: need - seat.need_bytes[d] for d, need in wider.items()}
            if room.lacks(more) is None:
                if claim:
                    room.claim(more)
                seat.slots, seat.need_bytes, has_grown = seat.slots + 1, wider, True
        return has_grown

    @staticmethod
    def _slots_asked(draft: Draft) -> int:
        return min(draft.settings.slots, draft.engine.traits.max_slots or draft.settings.slots)

    def _masks(self, settings: PoolSettings) -> list[list[Source]]:
        """The devices of each replica: one device each, in turn; all of them together only where a split was asked
        for."""
        # In the pool's own order, which `tensor_split` counts by.
        ids = list(self.sources) if settings.devices == "auto" else settings.devices
        usable = [self.sources[device_id] for device_id in ids]
        if settings.tensor_split is not None:
            return [usable]
        count = len(usable) if settings.replicas == "auto" else settings.replicas
        return [[usable[number % len(usable)]] for number in range(count)]

    # -- the pool ------------------------------------------------------------------------------------------------------

    def build(self, draft: Draft, *, state: ReplicaState, is_on_demand: bool = False) -> Built:
        """The pool, its replicas in `state` (those with a problem are failed)."""
        settings = draft.settings
        is_pinned = settings.keep_alive_ms is None and not is_on_demand
        replicas: dict[str, Replica] = {}
        workers: dict[str, tuple[Engine, ReplicaSpec]] = {}
        for seat in draft.seats:
            number = self._numbers.get(settings.id, 0)
            self._numbers[settings.id] = number + 1
            replica_id = f"{settings.id}-{number}"
            device_ids = tuple(source.device.device_id for source in seat.mask)
            replica = Replica(
                replica_id, settings.id, device_ids, seat.slots, state, seat.need_bytes, is_pinned=is_pinned
            )
            replica.is_remote = draft.model.elsewhere is not None
            if settings.replicas == "auto" and not is_pinned:
                # How many slots it gets is seen when it is loaded.
                replica.sizes = tuple(self.need(draft, seat.mask, count) for count in range(1, seat.slots + 1))
                replica.shrink()
            if seat.problem is not None:
                replica.refuse(seat.problem)
            elif state is ReplicaState.LOADING and seat.backend not in ("cuda", "remote"):
                self._on_cpu += 1
            replicas[replica_id] = replica
            threads = self.threads(seat.backend, is_staying=state is ReplicaState.LOADING)
            workers[replica_id] = (draft.engine, self._worker_spec(draft, replica_id, seat, threads))
        spec = self._pool_spec(draft, offer_for(draft.engine, draft.model), is_on_demand)
        return Built(Pool(spec, _queue(settings), replicas), workers)

    def arriving(self, settings: PoolSettings, model: Model) -> Pool:
        """A pool without replicas, whose model's file is still to come: it offers what its engine can do at all."""
        draft = self.draft(settings, model)
        offer = Offer(draft.engine.traits.workloads, draft.engine.traits.features)
        return Pool(self._pool_spec(draft, offer, True), _queue(settings), {}, is_arriving=True)

    def _pool_spec(self, draft: Draft, offer: Offer, is_on_demand: bool) -> PoolSpec:
        settings, traits = draft.settings, draft.engine.traits
        keep_ms = settings.keep_alive_ms
        return PoolSpec(
            pool_id=settings.id,
            engine=settings.engine,
            engine_version=traits.version,
            model=settings.model,
            workloads=offer.workloads,
            features=offer.features,
            slots=max((seat.slots for seat in draft.seats), default=settings.slots),
            ctx=settings.ctx,
            max_tokens=settings.max_tokens,
            sampler_profile_version=settings.sampler_profile_version,
            queue_capacity=settings.queue.capacity,
            full_policy=settings.queue.full_policy,
            strict_needs_exclusive=traits.strict_needs_exclusive,
            reads_whole_ctx=offer.reads_whole_ctx,
            tool_syntax=offer.tool_syntax,
            can_be_strict=traits.can_be_strict,
            is_known=not traits.is_remote,
            lacks=offer.lacks,
            keep_alive_s=None if keep_ms is None else keep_ms / 1000,
            is_on_demand=is_on_demand,
            kv_bytes_per_token=draft.model.kv_bytes_per_token(settings.ctx),
        )

    def _worker_spec(self, draft: Draft, replica_id: str, seat: Seat, threads: int) -> ReplicaSpec:
        return ReplicaSpec(
            replica_id=replica_id,
            pool_id=draft.settings.id,
            model_path=draft.model.path,
            slots=seat.slots,
            ctx=draft.settings.ctx,
            backend=seat.backend,
            device_uuids=tuple(source.uuid for source in seat.mask if source.uuid is not None),
            threads=threads,
            tensor_split=tuple(draft.settings.tensor_split or ()),
            model=draft.model.reference,
        )

    def threads(self, backend: str, *, is_staying: bool) -> int:
        """Replicas that compute on the CPU share its cores; one thread serves a card. What does not stay loaded runs
        beside those that do, and one on each device at least: more threads than cores wait for one another, and a token
        takes a hundred times as long."""
        if backend in ("cuda", "remote"):
            return 1
        on_cpu = sum(1 for one in self.sources.values() if one.backend != "cuda")
        sharing = self._on_cpu if is_staying else max(self._on_cpu + 1, on_cpu)
        return max(1, math.floor(len(os.sched_getaffinity(0)) / max(1, sharing)))


def _queue(settings: PoolSettings) -> TaskQueue:
    return TaskQueue(settings.queue.capacity, settings.queue.full_policy)


def offer_for(engine: Engine, model: Model) -> Offer:
    """What the engine does with the model, as far as is known before it is loaded."""
    if model.path is None:
        return model.elsewhere.offer if model.elsewhere is not None else Offer(engine.traits.workloads)
    return engine.offer(model.path)


def spec_as_found(spec: PoolSpec, facts: WorkerFacts) -> PoolSpec:
    """With what a server elsewhere turned out to have."""
    offer = facts.offer or Offer(spec.workloads, spec.features, lacks=spec.lacks)
    return replace(
        spec,
        slots=facts.slots,
        ctx=facts.ctx,
        workloads=offer.workloads,
        features=offer.features,
        is_known=True,
        lacks=offer.lacks,
    )


def calibration_key(digest: str, engine_version: str, ctx: int, slots: int, source: Source) -> CalibrationKey:
    return CalibrationKey(digest, engine_version, ctx, slots, KV_TYPE, source.device.name, source.backend)


def _does_not_fit(settings: PoolSettings, slots: int, device_id: str, need: int, free: int) -> str:
    count = f"{slots} slot{'s' if slots > 1 else ''}"
    return (
        f"{settings.model} with {count} of {settings.ctx} tokens needs {_mib(need)} on device {device_id}, which has "
        f"{_mib(free)} to give; use a smaller model, fewer slots or less ctx"
    )


def _mib(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"
