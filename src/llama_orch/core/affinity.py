"""Which slot holds a session's KV, so that its next task can go there (HP-SES-3). A memory, not a promise: what was
taken over in truth is what the engine counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llama_orch.core.replica import Replica

GAP_SLOTS = 2  # a warm replica is preferred while it has at most this many busy slots more than the best other one


@dataclass(frozen=True, slots=True)
class Warmth:
    """Where a session's last task ran, and how many tokens are there. `since_s` tells that worker from the next one of
    the same replica."""

    replica_id: str
    slot: int
    since_s: float
    tokens: int


class Affinity:
    """By session id, and by slot. At most as many as there are slots."""

    def __init__(self) -> None:
        self._warm: dict[str, Warmth] = {}
        self._holders: dict[tuple[str, int], str] = {}

    def remember(self, session_id: str, replica: Replica, slot: int, tokens: int) -> None:
        """The session's task ended on the slot."""
        if replica.ready_since_s is None:
            return
        self.forget(session_id)
        self.taken(None, replica, slot)
        self._warm[session_id] = Warmth(replica.replica_id, slot, replica.ready_since_s, tokens)
        self._holders[replica.replica_id, slot] = session_id

    def taken(self, session_id: str | None, replica: Replica, slot: int) -> None:
        """A task begins on the slot: whose KV was there loses it, unless it is the task's own session."""
        holder = self._holders.get((replica.replica_id, slot))
        if holder is not None and holder != session_id:
            self.forget(holder)

    def forget(self, session_id: str) -> Warmth | None:
        """Where its KV was, as far as that is known."""
        warmth = self._warm.pop(session_id, None)
        if warmth is not None:
            del self._holders[warmth.replica_id, warmth.slot]
        return warmth

    def warmth(self, session_id: str | None, replicas: Mapping[str, Replica]) -> Warmth | None:
        """Where the session's KV is; None where its worker is gone."""
        warmth = None if session_id is None else self._warm.get(session_id)
        if warmth is None or (replica := replicas.get(warmth.replica_id)) is None:
            return None
        return warmth if replica.ready_since_s == warmth.since_s else None

    def slot_on(self, session_id: str | None, replica: Replica) -> int | None:
        """The free slot of the replica that holds what the session had there; None where it holds nothing of it."""
        warmth = self.warmth(session_id, {replica.replica_id: replica})
        return None if warmth is None or warmth.slot in replica.leases else warmth.slot

    def holds(self, replica: Replica, slot: int) -> bool:
        """Whether some session's KV is on the slot."""
        holder = self._holders.get((replica.replica_id, slot))
        return self.warmth(holder, {replica.replica_id: replica}) is not None

    def tokens_on(self, replica: Replica) -> int:
        """Tokens of sessions that idle slots of the replica hold."""
        return sum(
            warmth.tokens
            for warmth in self._warm.values()
            if (warmth.replica_id, warmth.since_s) == (replica.replica_id, replica.ready_since_s)
            and warmth.slot not in replica.leases
        )
