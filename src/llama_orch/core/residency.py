"""Which model is loaded where, and who makes room for it: filter, score, pick. Plain functions over what is there now.

Whoever holds memory keeps it until somebody needs it. Then idle replicas go, as few and as cheap ones as will do: what
it costs to load one again, times how likely that is (GreedyDual's idea). A replica that a person configured to stay,
one that has only just come, and one that has work are left alone; the last only as long as those who wait can bear it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from llama_orch.contract.models import ReplicaState
from llama_orch.core.ledger import Ledger
from llama_orch.core.pool import Pool
from llama_orch.core.replica import Replica

REUSE_HALF_LIFE_S = 300.0  # of the chance that an idle model is asked for again
SUBSETS_FROM_MAX = 10  # every set of victims is looked at among this many, the cheapest: 1,024 sets


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
    crowd: int  # replicas with work that it would share its devices with
    cost: float
    free_bytes: int
    has_room: bool  # now, and not only once those have left who are leaving

    @property
    def rank(self) -> tuple[bool, bool, int, int, float, int, str]:
        """Nobody has to leave, and has to be waited for; room is kept for those who fit nowhere else; an idle device,
        which a working one would halve; the cheapest leave; the freest device."""
        return (
            bool(self.victims),
            not self.has_room,
            self.blocks,
            self.crowd,
            self.cost,
            -self.free_bytes,
            self.replica.replica_id,
        )


def may_leave(holder: Holder, now: float, *, idle_after_s: float, busy_after_s: float) -> bool:
    """Whether it may be asked to make room: for how long it must have served by then, idle or with work. One that is
    closing or leaving does so anyway."""
    replica = holder.replica
    if replica.is_pinned or replica.is_closing:
        return False
    if replica.state is ReplicaState.BACKOFF:
        return not holder.is_busy or busy_after_s < math.inf
    ready = replica.ready_since_s
    return (
        replica.state is ReplicaState.READY
        and ready is not None
        and ready + (busy_after_s if holder.is_busy else idle_after_s) <= now
    )


def cheapest_victims(
    replica: Replica, holders: Sequence[Holder], ledger: Ledger, now: float
) -> tuple[Holder, ...] | None:
    """Those whose memory, with what is free or comes back anyway, makes room for the replica; None where even all of
    them do not. The cheapest set, where few replicas are enough; else they are taken one by one, the cheapest first."""
    lacking = ledger.lacking_bytes(replica)
    able = [one for one in holders if lacking.keys() & one.replica.need_bytes.keys()]
    able = sorted(able, key=lambda one: (one.cost(now), one.replica.last_used_s, one.replica.replica_id))
    few = able[:SUBSETS_FROM_MAX]
    found = [
        chosen for count in range(len(few) + 1) for chosen in combinations(few, count) if _make_up_for(chosen, lacking)
    ]
    if found:
        return min(found, key=lambda chosen: (sum(victim.cost(now) for victim in chosen), len(chosen)))
    return _one_by_one(able, lacking)


def _make_up_for(leaving: Sequence[Holder], lacking: Mapping[str, int]) -> bool:
    return all(sum(v.replica.need_bytes.get(d, 0) for v in leaving) >= lack for d, lack in lacking.items())


def _one_by_one(able: Sequence[Holder], lacking: Mapping[str, int]) -> tuple[Holder, ...] | None:
    """All of them, less whom it does without: the dearest first."""
    chosen = list(able)
    for one in reversed(able):
        rest = [other for other in chosen if other is not one]
        if _make_up_for(rest, lacking):
            chosen = rest
    return tuple(chosen) if _make_up_for(chosen, lacking) else None


def proposals(
    candidates: Iterable[Replica],
    holders: Sequence[Holder],
    ledger: Ledger,
    blocks: Callable[[Replica], int],
    crowd: Callable[[Replica], int],
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
            free = ledger.scarcest_free_bytes(replica)
            others = crowd(replica) - sum(victim.is_busy for victim in victims)
            found.append(Proposal(replica, victims, blocks(replica), others, cost, free, ledger.has_room(replica)))
    return found


def blocked_by(newcomer: Replica, pools: Iterable[Pool], ledger: Ledger) -> int:
    """Models of these pools that fit only where the newcomer would be, and not beside it."""
    count = 0
    for pool in pools:
        if pool.is_loaded or not pool.is_live:
            continue
        able = [r for r in pool.replicas.values() if r.state is ReplicaState.UNLOADED]
        places = {replica.device_ids for replica in able}
        if places == {newcomer.device_ids} and not any(_fit_together(r, newcomer, ledger) for r in able):
            count += 1
    return count


def _fit_together(one: Replica, other: Replica, ledger: Ledger) -> bool:
    return all(
        one.need_bytes.get(d, 0) + other.need_bytes.get(d, 0) <= ledger.capacity_bytes(d) for d in one.device_ids
    )


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
