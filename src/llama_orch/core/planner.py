"""Decides which replica of a model is to be loaded, and who leaves for it. Reads the fleet's state and changes nothing.

Who may be asked to leave, in this order: nobody; those who are idle and have stayed long enough; for a model that has
no other place, those who have work but could do it elsewhere; and, once who waits has been patient, whoever has work.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from llama_orch.contract.models import ReplicaState
from llama_orch.core import residency
from llama_orch.core.ledger import Ledger
from llama_orch.core.pool import Pool
from llama_orch.core.prediction import Predictor
from llama_orch.core.replica import Replica
from llama_orch.core.residency import Holder, Proposal

# How long who waits for room bears it that others, who have work, keep theirs: in swaps (an unload, a load).
PATIENCE_SWAPS = 4.0
# An unmeasured load, by the size of what is loaded: a fast disk.
LOAD_GUESS_S, LOAD_GUESS_BYTES_PER_S = 0.5, 1e9
BACKLOG_UNKNOWN = 2  # tasks that wait for each one that can run, where nothing was measured


class Planner:
    """Over the fleet's own pools, replicas and ledger. `owner` gives a replica's pool."""

    def __init__(
        self,
        pools: Mapping[str, Pool],
        replicas: Mapping[str, Replica],
        ledger: Ledger,
        predictor: Predictor,
        owner: Callable[[Replica], Pool],
        *,
        min_residency_s: float,
    ) -> None:
        self._pools = pools
        self._replicas = replicas
        self._ledger = ledger
        self._predictor = predictor
        self._owner = owner
        self._min_residency_s = min_residency_s

    # -- who needs a replica -------------------------------------------------------------------------------------------

    @staticmethod
    def is_needed(pool: Pool, now: float) -> bool:
        """Whether somebody waits for the pool, or was told to come again."""
        is_open = not (pool.is_paused or pool.is_leaving)
        return bool(len(pool.queue)) or (pool.wanted_until_s > now and is_open)

    def has_backlog(self, pool: Pool) -> bool:
        """Whether one more replica would be loaded before those that there are have worked off the queue."""
        if not len(pool.queue) or any(r.state is ReplicaState.LOADING for r in pool.replicas.values()):
            return False
        spare = loadable(pool)
        if not spare:
            return False
        work_s = self._predictor.backlog_s(pool)
        if work_s is None:  # nothing is known of the model: a queue is taken for work enough
            return pool.is_ready and len(pool.queue) >= BACKLOG_UNKNOWN * pool.recommended_concurrency()
        return work_s > min(self.reload_s(replica) for replica in spare)

    # -- what is to be done --------------------------------------------------------------------------------------------

    def propose(self, pool: Pool, candidates: Sequence[Replica], now: float) -> Proposal | None:
        """The best that can be done for the pool now; None where all that could make room must be left alone."""
        found = self._pick(pool, candidates, (), now)
        others = [self._holder(r, now) for r in self._replicas.values() if self._owner(r) is not pool]
        if pool.waiting_since_s is None:
            return self._one_more(pool, candidates, found, others, now)
        if found is not None:
            return found
        for able in self._askable(pool, candidates, others, now):
            found = self._pick(pool, candidates, able, now)
            if found is not None:
                return found
        return None

    def _one_more(
        self,
        pool: Pool,
        candidates: Sequence[Replica],
        found: Proposal | None,
        others: Sequence[Holder],
        now: float,
    ) -> Proposal | None:
        """A further replica is worth no wait, and of others only those that are idle, if it gains more than they
        lose."""
        if found is not None and found.has_room:
            return found
        idle = [
            one
            for one in others
            if residency.may_leave(one, now, idle_after_s=self._min_residency_s, busy_after_s=math.inf)
        ]
        found = self._pick(pool, candidates, idle, now)
        work_s = self._predictor.backlog_s(pool)
        if found is None or work_s is None or found.cost + self.reload_s(found.replica) >= work_s:
            return None
        return found

    def _askable(
        self, pool: Pool, candidates: Sequence[Replica], others: Sequence[Holder], now: float
    ) -> Iterator[list[Holder]]:
        """Who may be asked to leave, more of them each time."""
        stay_s = self._min_residency_s

        def those(busy_after_s: float, movable_after_s: float) -> list[Holder]:
            return [
                one
                for one in others
                if residency.may_leave(
                    one,
                    now,
                    idle_after_s=stay_s,
                    busy_after_s=min(busy_after_s, movable_after_s if self._is_movable(one, candidates) else math.inf),
                )
            ]

        yield those(math.inf, math.inf)
        if len({replica.device_ids for replica in candidates}) == 1:
            yield those(math.inf, stay_s)
        patience_s = self.patience_s(candidates)
        if pool.waiting_since_s is not None and pool.waiting_since_s + patience_s <= now:
            yield those(patience_s, stay_s)

    def _is_movable(self, holder: Holder, candidates: Sequence[Replica]) -> bool:
        """Whether its model has, or could be given, a place on other devices than these."""
        contested = {device_id for replica in candidates for device_id in replica.device_ids}
        return any(
            contested.isdisjoint(other.device_ids)
            and not other.is_closing
            and (
                other.state in (ReplicaState.READY, ReplicaState.LOADING)
                or (other.state is ReplicaState.UNLOADED and self._ledger.has_room(other))
            )
            for other in self._owner(holder.replica).replicas.values()
        )

    def _pick(self, pool: Pool, candidates: Sequence[Replica], able: Sequence[Holder], now: float) -> Proposal | None:
        others = [other for other in self._pools.values() if other is not pool]

        def blocks(replica: Replica) -> int:
            return residency.blocked_by(replica, others, self._ledger)

        def crowd(replica: Replica) -> int:
            near = [r for r in self._replicas.values() if not set(r.device_ids).isdisjoint(replica.device_ids)]
            return sum(self._is_at_work(one, now) for one in near)

        return residency.pick(residency.proposals(candidates, able, self._ledger, blocks, crowd, now))

    def _is_at_work(self, replica: Replica, now: float) -> bool:
        """It runs a task, or will: it is loading, or some wait for it."""
        if replica.state is ReplicaState.LOADING:
            return True
        is_wanted = replica.state is ReplicaState.READY and self.is_needed(self._owner(replica), now)
        return bool(replica.leases) or is_wanted

    def room_makers(self, replica: Replica, now: float) -> tuple[Holder, ...] | None:
        """Who would have to leave for a replica that goes first; None where that would not do. The model whose place it
        takes is not asked: it leaves, if it has to, once it has done its work (see rollout.py)."""
        own = (self._owner(replica), self._pools.get(replica.pool_id))
        others = [r for r in self._replicas.values() if r.holds_memory and not r.is_pinned and not r.is_leaving]
        holders = [self._holder(other, now) for other in others if self._owner(other) not in own]
        return residency.cheapest_victims(replica, holders, self._ledger, now)

    def _holder(self, replica: Replica, now: float) -> Holder:
        is_busy = bool(replica.leases) or self.is_needed(self._owner(replica), now)
        return Holder(replica, is_busy, self.reload_s(replica))

    def is_hopeless(self, pool: Pool, now: float) -> bool:
        """Whether somebody waits for the pool, nothing of it serves or loads, and it would have no room even if all
        left that can be made to leave."""
        if not self.is_needed(pool, now) or pool.is_arriving:
            return False
        replicas = pool.replicas.values()
        if any(r.holds_memory and r.state is not ReplicaState.BACKOFF for r in replicas):
            return False
        return not any(
            self._could_fit(r) for r in replicas if r.state not in (ReplicaState.FAILED, ReplicaState.STOPPED)
        )

    def _could_fit(self, replica: Replica) -> bool:
        own = replica.need_bytes if replica.is_staying else {}
        return self._ledger.is_sound(replica) and all(
            need <= self._ledger.contested_bytes(d) + own.get(d, 0) for d, need in replica.need_bytes.items()
        )

    # -- what it costs -------------------------------------------------------------------------------------------------

    def reload_s(self, replica: Replica) -> float:
        """What loading it takes: as measured, there or elsewhere, else by its size."""
        pool = self._owner(replica)
        known = self._predictor.load_s(pool, replica) or self._predictor.load_anywhere_s(pool)
        if known is not None:
            return known
        return LOAD_GUESS_S + sum(replica.need_bytes.values()) / LOAD_GUESS_BYTES_PER_S

    def patience_s(self, candidates: Sequence[Replica]) -> float:
        """How long who waits bears it that others keep their room because they have work (no starvation), and how long
        those have it at least (no thrashing)."""
        return max(self._min_residency_s, PATIENCE_SWAPS * min(self.reload_s(replica) for replica in candidates))


def loadable(pool: Pool) -> list[Replica]:
    """The pool's replicas that may be loaded when they are needed: not one whose last process is still there."""
    idle = [r for r in pool.replicas.values() if r.state is ReplicaState.UNLOADED and not r.is_pinned]
    return [replica for replica in idle if not replica.is_lingering]
