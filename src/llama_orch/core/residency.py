"""Which model is loaded where, and who makes room for it: filter, score, pick. Plain functions over what is there now.

Whoever holds memory keeps it until somebody needs it. Then idle replicas go, as few and as cheap ones as will do: what
it costs to load one again, times how likely that is (GreedyDual's idea). A replica that a person configured to stay,
one that has only just come, and one that has work are left alone; the last only as long as those who wait can bear it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

from llama_orch.contract.models import ReplicaState
from llama_orch.core.ledger import Ledger
from llama_orch.core.replica import Replica

REUSE_HALF_LIFE_S = 300.0  # of the chance that an idle model is asked for again
SUBSETS_FROM_MAX = 10  # victims are sought among this many at most, the cheapest: 1,024 sets


@dataclass(frozen=True, slots=True)
class Holder:
    """A replica that might make room, with what the choice looks at."""

    replica: Replica
    is_busy: bool  # it runs a task, or one waits for it
    reload_s: float

    def cost(self, now: float) -> float:
        """Seconds that its loss is expected to cost later."""
        idle_s = 0.0 if self.is_busy else max(0.0, now - self.replica.last_used_s)
        return self.reload_s * math.exp2(-idle_s / REUSE_HALF_LIFE_S)


@dataclass(frozen=True, slots=True)
class Proposal:
    """Load this replica once these have left."""

    replica: Replica
    victims: tuple[Holder, ...]
    blocks: int  # models that fit only there and then would not fit any more
    cost: float
    free_bytes: int

    @property
    def rank(self) -> tuple[bool, int, float, int, str]:
        """Nobody has to leave, room is kept for those who fit nowhere else, the cheapest leave, the freest device."""
        return (bool(self.victims), self.blocks, self.cost, -self.free_bytes, self.replica.replica_id)


def may_leave(holder: Holder, now: float, min_residency_s: float, *, busy_too: bool) -> bool:
    """Whether it may be asked to make room. One that is closing or leaving does so anyway."""
    replica = holder.replica
    if replica.is_pinned or replica.is_closing or (holder.is_busy and not busy_too):
        return False
    if replica.state is ReplicaState.BACKOFF:
        return True
    ready = replica.ready_since_s
    return replica.state is ReplicaState.READY and ready is not None and now - ready >= min_residency_s


def cheapest_victims(
    replica: Replica, holders: Sequence[Holder], ledger: Ledger, now: float
) -> tuple[Holder, ...] | None:
    """Those whose memory, with what is free, makes room for the replica; None where even all of them do not."""
    short = {
        device_id: need - ledger.free_bytes(device_id, besides=replica)
        for device_id, need in replica.need_bytes.items()
    }
    short = {device_id: missing for device_id, missing in short.items() if missing > 0}
    able = [one for one in holders if short.keys() & one.replica.need_bytes.keys()]
    able = sorted(able, key=lambda one: (one.cost(now), one.replica.last_used_s))[:SUBSETS_FROM_MAX]
    found = [
        chosen
        for count in range(len(able) + 1)
        for chosen in combinations(able, count)
        if all(sum(v.replica.need_bytes.get(d, 0) for v in chosen) >= missing for d, missing in short.items())
    ]
    return min(found, key=lambda chosen: (sum(v.cost(now) for v in chosen), len(chosen)), default=None)


def proposals(
    candidates: Iterable[Replica],
    holders: Sequence[Holder],
    ledger: Ledger,
    blocks: Callable[[Replica], int],
    now: float,
) -> list[Proposal]:
    """What could be done for a model that is needed, for each replica that it may have."""
    found = []
    for replica in candidates:
        if not ledger.is_sound(replica):
            continue
        victims = cheapest_victims(replica, holders, ledger, now)
        if victims is not None:
            cost = sum(victim.cost(now) for victim in victims)
            found.append(Proposal(replica, victims, blocks(replica), cost, ledger.scarcest_free_bytes(replica)))
    return found


def pick(found: Sequence[Proposal]) -> Proposal | None:
    return min(found, key=lambda proposal: proposal.rank, default=None)


def shortage(candidates: Iterable[Replica], ledger: Ledger) -> str:
    """Why none of the candidates can be loaded now, with the figures."""
    parts = []
    for replica in candidates:
        for device_id, need in replica.need_bytes.items():
            device = ledger.devices[device_id]
            if device.problem is not None:
                parts.append(f"device {device_id} cannot be used ({device.problem})")
                continue
            free = max(0, ledger.free_bytes(device_id, besides=replica))
            parts.append(f"{need / 2**20:,.0f} MiB are needed on device {device_id}, which has {free / 2**20:,.0f}")
    return "; ".join(parts) or "no device can hold it"
