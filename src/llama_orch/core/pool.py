"""Pools, replicas, slots and devices: what there is to run on, and who holds it."""

from __future__ import annotations

from dataclasses import dataclass, field

from llama_orch.contract.models import ReplicaState
from llama_orch.core.queue import FullPolicy, TaskQueue
from llama_orch.core.task import Lease

BACKOFF_FIRST_S = 0.5
BACKOFF_MAX_S = 30.0
RESTARTS_MAX = 6  # losses in a row without a sound spell in between; then the replica is given up
SOUND_SPELL_S = 60.0  # a replica that served this long starts its count of losses anew


@dataclass(frozen=True, slots=True)
class PoolSpec:
    """What the configuration fixes of a pool. Context in tokens per slot."""

    pool_id: str
    engine: str
    engine_version: str
    model: str
    workloads: tuple[str, ...]
    features: tuple[str, ...]
    slots: int
    ctx: int
    max_tokens: int
    sampler_profile_version: str
    queue_capacity: int
    full_policy: FullPolicy
    strict_needs_exclusive: bool


@dataclass(slots=True, eq=False)
class Device:
    """One card, or the CPU. Bytes free is what the device layer saw last."""

    device_id: str
    name: str
    backend: str
    vram_total_bytes: int
    vram_free_bytes: int


@dataclass(slots=True, eq=False)
class Replica:
    """One worker process of a pool, on one device mask."""

    replica_id: str
    pool_id: str
    device_ids: tuple[str, ...]
    slots: int
    state: ReplicaState = ReplicaState.LOADING
    leases: dict[int, str] = field(default_factory=dict)  # slot -> task id
    restarts: int = 0
    losses_in_a_row: int = 0
    ready_since_s: float | None = None
    loading_since_s: float = 0.0
    retry_at_s: float | None = None  # set in state `backoff` only
    last_error: str | None = None

    @property
    def slots_busy(self) -> int:
        return len(self.leases)

    def can_take(self, *, exclusive: bool) -> bool:
        """Whether a task could start on it now."""
        if self.state is not ReplicaState.READY:
            return False
        return not self.leases if exclusive else len(self.leases) < self.slots

    def take(self, task_id: str, *, exclusive: bool) -> Lease:
        free = [slot for slot in range(self.slots) if slot not in self.leases]
        slots = tuple(free if exclusive else free[:1])
        for slot in slots:
            self.leases[slot] = task_id
        return Lease(self.replica_id, slots)

    def release(self, lease: Lease, task_id: str) -> None:
        for slot in lease.slots:
            if self.leases.get(slot) == task_id:  # after a loss the slot may have another holder already
                del self.leases[slot]

    def refuse(self, problem: str) -> None:
        """It does not fit its devices and is never started (HP-PLC-5)."""
        self.state, self.last_error = ReplicaState.FAILED, problem

    def mark_ready(self, slots: int, now: float) -> None:
        self.state, self.slots, self.ready_since_s, self.retry_at_s = ReplicaState.READY, slots, now, None

    def mark_lost(self, reason: str, now: float, *, may_restart: bool = True) -> None:
        """Backoff doubles with each loss in a row; after too many the replica is given up (HP-PLC-7)."""
        if self.ready_since_s is not None and now - self.ready_since_s >= SOUND_SPELL_S:
            self.losses_in_a_row = 0
        self.losses_in_a_row += 1
        self.leases.clear()
        self.ready_since_s = None
        self.last_error = reason
        if self.losses_in_a_row > RESTARTS_MAX:
            self.state, self.retry_at_s = ReplicaState.FAILED, None
            return
        if not may_restart:
            self.mark_stopped()
            return
        self.state = ReplicaState.BACKOFF
        self.retry_at_s = now + min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2 ** (self.losses_in_a_row - 1))

    def mark_loading(self, now: float) -> None:
        self.state, self.loading_since_s, self.retry_at_s = ReplicaState.LOADING, now, None
        self.restarts += 1

    def mark_stopped(self) -> None:
        """No restart will come: the service is ending."""
        self.state, self.retry_at_s = ReplicaState.STOPPED, None


@dataclass(slots=True, eq=False)
class Pool:
    """Replicas of one model on one engine, behind one queue."""

    spec: PoolSpec
    queue: TaskQueue
    replicas: dict[str, Replica]
    model_digest: str | None = None
    is_draining: bool = False
    tokens_in: int = 0
    tokens_out: int = 0

    @property
    def is_ready(self) -> bool:
        return any(replica.state is ReplicaState.READY for replica in self.replicas.values())

    @property
    def is_live(self) -> bool:
        """Some replica serves or may yet serve."""
        gone = (ReplicaState.FAILED, ReplicaState.STOPPED)
        return any(replica.state not in gone for replica in self.replicas.values())

    @property
    def last_error(self) -> str | None:
        return next((r.last_error for r in self.replicas.values() if r.last_error is not None), None)

    def slots_total(self) -> int:
        return sum(r.slots for r in self.replicas.values() if r.state is ReplicaState.READY)

    def recommended_concurrency(self) -> int:
        """Strict tasks that run at the same time without waiting (HP-PLC-2)."""
        if not self.spec.strict_needs_exclusive:
            return self.slots_total()
        return sum(1 for r in self.replicas.values() if r.state is ReplicaState.READY)

    def serves(self, model_ref: str) -> bool:
        return model_ref == self.spec.model or (self.model_digest is not None and model_ref == self.model_digest)
