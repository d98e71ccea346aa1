"""Pools: the replicas of one model on one engine, behind one queue."""

from __future__ import annotations

from dataclasses import dataclass, field

from llama_orch.contract.models import Priority, ReplicaState
from llama_orch.core.bar import Bar
from llama_orch.core.course import Course, Pace
from llama_orch.core.queue import FullPolicy, TaskQueue
from llama_orch.core.replica import Replica
from llama_orch.core.turns import Turns


@dataclass(frozen=True, slots=True)
class PoolSpec:
    """What is fixed of a pool as long as it has its model. Context in tokens per slot."""

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
    reads_whole_ctx: bool = False  # a text that is only read may fill the context
    tool_syntax: str | None = None  # how its model writes calls of tools; None: it knows none
    keep_alive_s: float | None = None  # unloaded after this long without a task; None keeps it loaded
    is_on_demand: bool = False  # made for a task, not by the configuration
    kv_bytes_per_token: int = 0
    aliases: tuple[str, ...] = ()  # other references that lead to the same file
    can_be_strict: bool = True  # else a task that asks for `strict` is refused
    is_known: bool = True  # false while a server elsewhere has not said yet what it does
    lacks: tuple[str, ...] = ()  # fields that its engine cannot be given

    @property
    def speed_key(self) -> tuple[str, str]:
        """What measured speeds hold for, besides the device."""
        return self.engine, self.model


@dataclass(slots=True, eq=False)
class Pool:
    """Replicas of one model on one engine, behind one queue. Another model is another Pool with the same id."""

    spec: PoolSpec
    queue: TaskQueue
    replicas: dict[str, Replica]
    model_digest: str | None = None
    is_draining: bool = False
    drain_until_s: float | None = None
    bar: Bar | None = None  # the catalog keeps its model from new tasks
    is_arriving: bool = False  # its model's file is on its way from elsewhere, and it has no replicas yet
    arrival_s: float | None = None  # when the file will be there, as far as is known
    is_paused: bool = False  # it takes no new tasks because another model takes its place
    last_reload: str | None = None
    wanted_until_s: float = 0.0  # somebody asked for it who could not be queued yet
    waiting_since_s: float | None = None  # the first of those who wait, or who asked, without a replica that comes
    hopeless_since_s: float | None = None  # it waits for room that nobody who can be made to leave has
    turns: Turns = field(default_factory=Turns)  # of those who found the queue full
    courses: dict[Priority, Course] = field(default_factory=dict)  # how its queue was last played forward
    pace: Pace | None = None  # of those who wait further back
    tokens_in: int = 0
    tokens_out: int = 0
    why_not_loaded: str | None = field(default=None)

    @property
    def is_leaving(self) -> bool:
        """It takes no new tasks, and is unloaded once it has none."""
        return self.is_draining or (self.bar is not None and self.bar.is_lasting)

    @property
    def is_ready(self) -> bool:
        return any(replica.state is ReplicaState.READY for replica in self.replicas.values())

    @property
    def is_live(self) -> bool:
        """Some replica serves or may yet serve."""
        gone = (ReplicaState.FAILED, ReplicaState.STOPPED)
        return self.is_arriving or any(replica.state not in gone for replica in self.replicas.values())

    @property
    def is_coming(self) -> bool:
        """Some replica serves, or will without anybody's doing."""
        return self.is_arriving or any(replica.is_coming for replica in self.replicas.values())

    @property
    def is_loaded(self) -> bool:
        """Some replica holds memory, or is promised some."""
        return any(r.holds_memory or r.state is ReplicaState.LOADING for r in self.replicas.values())

    @property
    def last_error(self) -> str | None:
        return next((r.last_error for r in self.replicas.values() if r.last_error is not None), None)

    @property
    def is_idle(self) -> bool:
        """Nobody waits, and no slot is held."""
        return not len(self.queue) and not any(replica.leases for replica in self.replicas.values())

    def slots_total(self) -> int:
        return sum(r.slots for r in self.replicas.values() if r.state is ReplicaState.READY)

    def recommended_concurrency(self) -> int:
        """Strict tasks that run at the same time without waiting (HP-PLC-2)."""
        if not self.spec.strict_needs_exclusive:
            return self.slots_total()
        return sum(1 for r in self.replicas.values() if r.state is ReplicaState.READY)

    def serves(self, model_ref: str) -> bool:
        return (
            model_ref == self.spec.model
            or model_ref in self.spec.aliases
            or (self.model_digest is not None and model_ref == self.model_digest)
        )
