"""What the core asks the runtime to do. The runtime performs effects in order and reports back with events."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Admitted:
    """A task entered. Comes before anything else about it."""

    task_id: str


@dataclass(frozen=True, slots=True)
class Start:
    """Decode this task on the slots that its lease names."""

    task_id: str


@dataclass(frozen=True, slots=True)
class Abort:
    """Stop decoding, then report `released`. The task has ended already."""

    task_id: str


@dataclass(frozen=True, slots=True)
class Ended:
    """The task reached its final state: its stream's last frame is due."""

    task_id: str


@dataclass(frozen=True, slots=True)
class Evict:
    """Have the engine forget the KV that this slot holds, on which nobody decodes. A Start on the slot that comes later
    waits for it."""

    replica_id: str
    slot: int


@dataclass(frozen=True, slots=True)
class Forget:
    """The task's time of retention is over."""

    task_id: str


@dataclass(frozen=True, slots=True)
class Load:
    """Start this replica's worker (again)."""

    replica_id: str


@dataclass(frozen=True, slots=True)
class Unload:
    """End this replica's worker, see its memory return, then report `replica_unloaded`. Nothing runs on it."""

    replica_id: str
    reason: str  # evicted, idle, drain, reload


@dataclass(frozen=True, slots=True)
class Condemn:
    """This replica's worker cannot be trusted any more: report `replica_lost` and end it."""

    replica_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Dispose:
    """This replica will not be used again."""

    replica_id: str


Effect = Admitted | Start | Abort | Ended | Evict | Forget | Load | Unload | Condemn | Dispose
