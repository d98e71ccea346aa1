"""Which replica a task runs on: filter, score, pick (HP-PLC-1). Plain functions over what is there now.

A task is bound to a replica only when it starts. Of those that could start it now the least loaded one takes it: most
free memory, then fewest busy slots, then the first id. Two things come before: a session goes back to the slot that
holds its KV while that costs it little, and nobody starts on a slow card who would be done sooner by waiting for a fast
one (see `hold_back`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from llama_orch.core.affinity import GAP_SLOTS
from llama_orch.core.replica import Replica


@dataclass(frozen=True, slots=True)
class Candidate:
    """A replica that could take the task, with what the choice looks at."""

    replica: Replica
    vram_free_bytes: int  # of its scarcest device
    slots_busy: int
    warm_slot: int | None = None  # the one that holds the session's KV

    @property
    def rank(self) -> tuple[int, int, str]:
        """Most free VRAM, then fewest busy slots, then replica id."""
        return (-self.vram_free_bytes, self.slots_busy, self.replica.replica_id)


def candidates(
    replicas: Iterable[Replica],
    free_bytes: Callable[[Replica], int],
    *,
    exclusive: bool,
    warm_slot: Callable[[Replica], int | None] = lambda _: None,
) -> list[Candidate]:
    """The replicas that could start the task now. `free_bytes`: of a replica's scarcest device."""
    return [
        Candidate(replica, free_bytes(replica), replica.slots_busy, warm_slot(replica))
        for replica in replicas
        if replica.can_take(exclusive=exclusive)
    ]


def pick(found: Sequence[Candidate]) -> Candidate | None:
    """The warm one unless it is much busier than the best one; else the best one by rank."""
    least_busy = min((candidate.slots_busy for candidate in found), default=0)
    warm = [c for c in found if c.warm_slot is not None and c.slots_busy - least_busy <= GAP_SLOTS]
    return min(warm or found, key=lambda candidate: candidate.rank, default=None)


def reasons(chosen: Candidate, found: Sequence[Candidate]) -> str:
    """Why this replica, for the task and the log."""
    figures = "; ".join(
        f"{c.replica.replica_id}: {c.vram_free_bytes / 2**20:.0f} MiB free, {c.slots_busy}/{c.replica.slots} slots busy"
        for c in sorted(found, key=lambda c: c.rank)
    )
    warm = "" if chosen.warm_slot is None else f", slot {chosen.warm_slot} holds its session"
    return f"{chosen.replica.replica_id} chosen of {len(found)} ({figures}{warm})"


@dataclass(frozen=True, slots=True)
class Faster:
    """A busy replica that is faster than the chosen one: when it gets free, and how long it takes for each of those who
    wait, the task in hand first. Seconds."""

    free_in_s: float
    services_s: Sequence[float]


def hold_back(service_s: float, faster: Sequence[Faster]) -> bool:
    """Whether a task should rather wait than start on a slow card, where it would take `service_s`.

    It should when the faster ones would be done with it and with everybody behind it before the slow one was done with
    it alone: then starting it there makes the whole queue end later. With a longer queue the slow card is of use.
    """
    if not faster:
        return False
    rate = sum(1 / max(sum(one.services_s), 1e-9) for one in faster)
    return service_s > min(one.free_in_s for one in faster) + 1 / rate
