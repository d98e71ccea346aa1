"""Which slot holds a session's KV, so that its next task can go there (HP-SES-3). A memory, not a promise."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from llama_orch.core.replica import Replica

SESSIONS_MAX = 4096
GAP_SLOTS = 2  # a warm replica is preferred while it has at most this many busy slots more than the best other one


@dataclass(frozen=True, slots=True)
class Warmth:
    """Where a session's last task ran. `since_s` tells that worker from the next one of the same replica."""

    replica_id: str
    slot: int
    since_s: float


class Affinity:
    """By session id, the latest last."""

    def __init__(self) -> None:
        self._warm: OrderedDict[str, Warmth] = OrderedDict()

    def remember(self, session_id: str, replica: Replica, slot: int) -> None:
        if replica.ready_since_s is None:
            return
        self._warm[session_id] = Warmth(replica.replica_id, slot, replica.ready_since_s)
        self._warm.move_to_end(session_id)
        if len(self._warm) > SESSIONS_MAX:
            self._warm.popitem(last=False)

    def slot_on(self, session_id: str | None, replica: Replica) -> int | None:
        """The replica's slot that holds what the session had there; None where it holds nothing of it."""
        warmth = None if session_id is None else self._warm.get(session_id)
        if warmth is None or (warmth.replica_id, warmth.since_s) != (replica.replica_id, replica.ready_since_s):
            return None
        return warmth.slot if warmth.slot not in replica.leases else None
