"""A replica's life, and who holds its slots. The life is the table below; a step that the table lacks is a defect.

`unloaded` is where a replica begins and where it returns to: it costs nothing and may be loaded when a task needs it.
From `loading` to `unloading`, `backoff` included, it holds memory on its devices (see ledger.py).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from llama_orch.contract.models import ReplicaState

BACKOFF_FIRST_S = 0.5
BACKOFF_MAX_S = 30.0
_DOUBLINGS_MAX = 16
RESTARTS_MAX = 6  # losses in a row without a sound spell in between; then the replica is given up
FAILED_LOADS_MAX = 2  # of a model that was loaded on demand and has never served: who waits for it hears of it soon
SOUND_SPELL_S = 60.0  # a replica that served this long starts its count of losses anew


class ReplicaEvent(StrEnum):
    """What can happen to a replica."""

    LOAD = "load"  # its worker is to be started
    READY = "ready"  # its worker serves
    LOSE = "lose"  # its worker is gone and will be started again
    GIVE_UP = "give_up"  # quarantined: it died too often, or no device can hold it
    UNLOAD = "unload"  # its worker is to end
    UNLOADED = "unloaded"  # its worker is gone and its memory is back
    REVIVE = "revive"  # the quarantine is over
    STOP = "stop"  # it is not needed any more


_S, _E = ReplicaState, ReplicaEvent

TRANSITIONS: dict[tuple[ReplicaState, ReplicaEvent], ReplicaState] = {
    (_S.UNLOADED, _E.LOAD): _S.LOADING,
    (_S.UNLOADED, _E.GIVE_UP): _S.FAILED,
    (_S.UNLOADED, _E.STOP): _S.STOPPED,
    (_S.LOADING, _E.READY): _S.READY,
    (_S.LOADING, _E.LOSE): _S.BACKOFF,
    (_S.LOADING, _E.GIVE_UP): _S.FAILED,
    (_S.LOADING, _E.UNLOAD): _S.UNLOADING,
    (_S.LOADING, _E.UNLOADED): _S.UNLOADED,  # it was never launched, or had no room
    (_S.LOADING, _E.STOP): _S.STOPPED,
    (_S.READY, _E.LOSE): _S.BACKOFF,
    (_S.READY, _E.GIVE_UP): _S.FAILED,
    (_S.READY, _E.UNLOAD): _S.UNLOADING,
    (_S.READY, _E.STOP): _S.STOPPED,
    (_S.UNLOADING, _E.UNLOADED): _S.UNLOADED,
    (_S.UNLOADING, _E.STOP): _S.STOPPED,
    (_S.BACKOFF, _E.LOAD): _S.LOADING,
    (_S.BACKOFF, _E.GIVE_UP): _S.FAILED,
    (_S.BACKOFF, _E.UNLOADED): _S.UNLOADED,
    (_S.BACKOFF, _E.STOP): _S.STOPPED,
    (_S.FAILED, _E.REVIVE): _S.UNLOADED,
    (_S.FAILED, _E.STOP): _S.STOPPED,
}

# In these states its memory is taken, or must be kept for it.
HOLDS_MEMORY = frozenset({_S.LOADING, _S.READY, _S.UNLOADING, _S.BACKOFF})
# In these it serves, or will by itself.
COMES = frozenset({_S.LOADING, _S.READY, _S.BACKOFF})


@dataclass(frozen=True, slots=True)
class Lease:
    """A task's hold on slots of one replica. `slots` has one element, or all of the replica's when exclusive; the task
    decodes on the first of them."""

    replica_id: str
    slots: tuple[int, ...]


@dataclass(slots=True, eq=False)
class Replica:
    """One worker process of a pool, on one device mask. `need_bytes` is what it takes of each device: as predicted, and
    as measured once it has been loaded."""

    replica_id: str
    pool_id: str
    device_ids: tuple[str, ...]
    slots: int
    state: ReplicaState = ReplicaState.LOADING
    need_bytes: Mapping[str, int] = field(default_factory=dict)
    sizes: tuple[Mapping[str, int], ...] = ()  # what it would take with 1, 2, … slots; empty where `slots` is fixed
    is_pinned: bool = True  # it stays loaded: nobody may evict it
    is_remote: bool = False  # it is on a server elsewhere: it takes no memory here, and is never given up
    is_launched: bool = True  # false while it is `loading` in name and waits for the room that others leave
    is_lingering: bool = False  # it was lost, but its process is not gone yet
    is_closing: bool = False  # it takes no more tasks, and is unloaded once it holds none
    close_reason: str = ""
    leases: dict[int, str] = field(default_factory=dict)  # slot -> task id
    slot_used_s: dict[int, float] = field(default_factory=dict)  # slot with a session's KV -> when it was last let go
    model_digest: str | None = None  # of the bytes that its worker loaded; a file may be another one by the next load
    restarts: int = 0
    losses_in_a_row: int = 0
    has_served: bool = False  # since it was last unloaded
    shortages: int = 0  # of memory, in a row
    need_factor: float = 1.0  # by which it took more than was predicted, as its shortages say
    need_growth: float = 1.0  # of it, what is not in `need_bytes` yet: that is what the process has that is still there
    ready_since_s: float | None = None
    loading_since_s: float = 0.0
    promised_since_s: float | None = None  # others had to leave first
    last_used_s: float = 0.0
    retry_at_s: float | None = None  # set in state `backoff` only
    failed_at_s: float | None = None
    last_error: str | None = None

    @property
    def slots_busy(self) -> int:
        return len(self.leases)

    @property
    def holds_memory(self) -> bool:
        return self.is_lingering or (self.state in HOLDS_MEMORY and not self.is_promised)

    @property
    def is_promised(self) -> bool:
        """It is to be loaded once there is room."""
        return self.state is ReplicaState.LOADING and not self.is_launched

    @property
    def is_staying(self) -> bool:
        """It has memory, or was promised some, that nobody can make it give up."""
        return self.is_pinned and (self.holds_memory or self.is_promised)

    @property
    def is_leaving(self) -> bool:
        """Its memory comes back without anybody's doing."""
        is_over = self.state not in HOLDS_MEMORY or self.is_promised  # a lost worker, whose process is not gone
        return self.holds_memory and (is_over or self.is_closing or self.state is ReplicaState.UNLOADING)

    @property
    def is_coming(self) -> bool:
        return self.state in COMES and not self.is_closing

    def occupation(self) -> Hashable:
        """All of it that bears on when its slots get free, but for the progress of those who hold them."""
        own = self.replica_id, self.state, self.is_closing, self.is_launched, self.loading_since_s, self.retry_at_s
        return own, self.slots, tuple(self.leases.items())

    def step(self, event: ReplicaEvent) -> None:
        self.state = TRANSITIONS[self.state, event]

    def can_take(self, *, exclusive: bool) -> bool:
        """Whether a task could start on it now."""
        if self.state is not ReplicaState.READY or self.is_closing:
            return False
        return not self.leases if exclusive else len(self.leases) < self.slots

    def take(self, task_id: str, *, exclusive: bool, slot: int | None = None) -> Lease:
        """`slot`: the one to decode on if it is free; else one that holds nothing of worth, or was let go the longest
        time ago, so that what others hold of a session's KV stays as long as it can."""
        free = [slot for slot in range(self.slots) if slot not in self.leases]
        free.sort(key=lambda one: (one != slot, self.slot_used_s.get(one, -1.0), one))
        slots = tuple(free if exclusive else free[:1])
        for one in slots:
            self.leases[one] = task_id
        return Lease(self.replica_id, slots)

    def release(self, lease: Lease, task_id: str, now: float, *, keeps_kv: bool = False) -> None:
        """`keeps_kv`: the slot that it ran on holds a session's KV from now on. The others hold what they held."""
        for slot in lease.slots:
            if self.leases.get(slot) != task_id:  # after a loss the slot may have another holder already
                continue
            del self.leases[slot]
            self.last_used_s = now
            if slot == lease.slots[0]:
                self.slot_used_s.pop(slot, None)
                if keeps_kv:
                    self.slot_used_s[slot] = now

    # -- life --------------------------------------------------------------------------------------------------------

    def refuse(self, problem: str) -> None:
        """It does not fit its devices and is never started (HP-PLC-5)."""
        self.state, self.last_error = ReplicaState.FAILED, problem

    def mark_loading(self, now: float, *, is_launched: bool = True) -> None:
        if self.state is ReplicaState.BACKOFF:
            self.restarts += 1
        self.step(ReplicaEvent.LOAD)
        self.loading_since_s, self.retry_at_s, self.is_launched = now, None, is_launched
        self.promised_since_s = None if is_launched else now

    def mark_ready(self, slots: int, now: float) -> None:
        self.step(ReplicaEvent.READY)
        self.slots, self.ready_since_s, self.last_used_s = slots, now, now
        self.has_served, self.shortages = True, 0
        self.slot_used_s.clear()

    def mark_lost(self, reason: str, now: float, *, may_restart: bool = True) -> None:
        """Backoff doubles with each loss in a row; after too many the replica is given up (HP-PLC-7), unless it is
        elsewhere, where others may mend it (HP-REM-3)."""
        if self.ready_since_s is not None and now - self.ready_since_s >= SOUND_SPELL_S:
            self.losses_in_a_row = 0
        self.losses_in_a_row += 1
        self._lose_worker(reason)
        losses_max = RESTARTS_MAX if self.is_pinned or self.has_served else FAILED_LOADS_MAX
        if self.losses_in_a_row > losses_max and not self.is_remote:
            self.give_up(now)
        elif not may_restart:
            self.mark_stopped()
        else:
            self.step(ReplicaEvent.LOSE)
            self.retry_at_s = now + min(
                BACKOFF_MAX_S, BACKOFF_FIRST_S * 2 ** min(_DOUBLINGS_MAX, self.losses_in_a_row - 1)
            )

    def mark_short(self, reason: str) -> None:
        """Its devices had less room than it needed: back to where it can be planned anew."""
        self.shortages += 1
        if self.state is ReplicaState.READY:
            self.step(ReplicaEvent.LOSE)
        self._lose_worker(reason)
        self.step(ReplicaEvent.UNLOADED)
        self.is_closing, self.close_reason = False, ""

    def resize(self, slots: int) -> None:
        """To be loaded with this many slots, at most as many as there are sizes for."""
        self.slots = slots
        self.need_bytes = {d: round(need * self.need_factor) for d, need in self.sizes[slots - 1].items()}

    def measured(self, need_bytes: Mapping[str, int]) -> None:
        """What it was seen to take, in place of what was predicted. Where it has one size only, the next prediction is
        that, and no longer what its shortages made of the first one."""
        self.need_bytes = {**self.need_bytes, **need_bytes}
        if not self.sizes:
            self.need_factor = 1.0

    def shrink(self) -> None:
        """Back to the least that it can be loaded with, which is what counts as long as it is not."""
        if self.sizes and not self.is_lingering:
            self.resize(1)

    def mark_gone(self) -> None:
        """The process of its lost worker has ended, and its memory is back."""
        self.is_lingering = False
        self._grow()
        if not self.holds_memory:
            self.shrink()

    def need_more(self, factor: float) -> None:
        """What was predicted was too little; until the quarantine ends."""
        self.need_factor *= factor
        self.need_growth *= factor
        self._grow()

    def _grow(self) -> None:
        if not self.is_lingering:
            self.need_bytes = {d: round(need * self.need_growth) for d, need in self.need_bytes.items()}
            self.need_growth = 1.0

    def mark_homeless(self) -> None:
        """It cannot be started again where it was: it is planned anew, and its losses go on to count."""
        self.step(ReplicaEvent.UNLOADED)
        self._forget_worker()
        self.shrink()

    def mark_failed_load(self, reason: str, now: float) -> None:
        """It was to take another model's place and could not: it is not tried again."""
        self._lose_worker(reason)
        self.give_up(now)

    def give_up(self, now: float) -> None:
        self.step(ReplicaEvent.GIVE_UP)
        self.retry_at_s, self.failed_at_s = None, now
        self.is_closing, self.close_reason = False, ""

    def mark_unloading(self) -> None:
        self.step(ReplicaEvent.UNLOAD)
        self.ready_since_s = None

    def mark_unloaded(self) -> None:
        self.step(ReplicaEvent.UNLOADED)
        self._forget_worker()
        self.is_closing, self.close_reason, self.has_served, self.losses_in_a_row = False, "", False, 0
        self.shrink()

    def revive(self) -> None:
        """A new chance: the reason of the quarantine may be gone."""
        self.step(ReplicaEvent.REVIVE)
        self.losses_in_a_row, self.shortages, self.failed_at_s, self.last_error = 0, 0, None, None
        if self.need_factor != 1.0:  # it was another program's memory, perhaps
            self.need_growth, self.need_factor = self.need_growth / self.need_factor, 1.0
            self._grow()
        self.shrink()

    def mark_stopped(self) -> None:
        """No restart will come: the service is ending, or the pool has another model."""
        if self.state is not ReplicaState.STOPPED:
            self.step(ReplicaEvent.STOP)
        self._forget_worker()

    def _lose_worker(self, reason: str) -> None:
        self._forget_worker()
        self.last_error = reason

    def _forget_worker(self) -> None:
        self.leases.clear()
        self.slot_used_s.clear()
        self.ready_since_s, self.retry_at_s, self.is_launched, self.promised_since_s = None, None, True, None
