"""The fleet: pools, their replicas and the devices under them. Decides what is loaded, and what leaves for it.

Every event that could change the answer is followed by `settle`, which leaves effects. Nothing here knows of tasks but
who waits in a queue and who holds a slot. Invariants: no device is given away twice (ledger.py); a replica with work is
never unloaded; what leaves keeps its memory in the ledger until it was seen to return.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from llama_orch.contract.models import ReplicaState
from llama_orch.core import residency
from llama_orch.core.effects import Condemn, Dispose, Effect, Load, Unload
from llama_orch.core.ledger import Device, Ledger
from llama_orch.core.planner import Planner, loadable
from llama_orch.core.pool import Pool, PoolSpec
from llama_orch.core.prediction import Predictor
from llama_orch.core.replica import Replica
from llama_orch.core.residency import Holder

NO_PLACE_RETRY_S = 5.0  # before a replica is tried again on a device that cannot be used, or has no room for it
WANTED_S = 60.0  # a pool that somebody asked for is kept wanted for this long, until the request comes again
HOPE_S = 60.0  # for room that nobody of ours can make: another program's, or a person's to give
SHORTAGES_MAX = 1  # of memory, before a replica is given up
SHORTAGE_GROWTH = 1.15  # of the predicted need, after a shortage
QUARANTINE_S = 60.0  # of what was loaded on demand and failed; then it is tried again for a task


class Fleet:
    """`emit` takes effects. `min_residency_s`: what was loaded on demand stays at least this long."""

    def __init__(
        self,
        pools: Sequence[Pool],
        devices: Sequence[Device],
        predictor: Predictor,
        emit: Callable[[Effect], None],
        *,
        min_residency_s: float,
    ) -> None:
        self.pools = {pool.spec.pool_id: pool for pool in pools}
        self.retiring: list[Pool] = []  # another model has their id; they finish what they were given
        self.replicas: dict[str, Replica] = {r.replica_id: r for pool in pools for r in pool.replicas.values()}
        self.ledger = Ledger(devices, self.replicas)
        self.is_ending = False
        self.coming: dict[str, Pool] = {}  # by id of the pool whose place they take: see rollout.py
        self._emit = emit
        self._min_residency_s = min_residency_s
        self._settled_s = 0.0
        self.planner = Planner(
            self.pools, self.replicas, self.ledger, predictor, self.owner, min_residency_s=min_residency_s
        )
        self._owners: dict[str, Pool] = {r.replica_id: pool for pool in pools for r in pool.replicas.values()}

    def owner(self, replica: Replica) -> Pool:
        """The pool that the replica serves; of several with one id the right one."""
        return self._owners[replica.replica_id]

    def every_pool(self) -> Iterator[Pool]:
        """Those in service, those that finish, and those that are about to come."""
        yield from self.pools.values()
        yield from self.retiring
        yield from self.coming.values()

    def add(self, pool: Pool) -> None:
        """Its replicas, and the pool itself unless its id is taken."""
        self.pools.setdefault(pool.spec.pool_id, pool)
        self.replicas |= pool.replicas
        self._owners |= dict.fromkeys(pool.replicas, pool)

    def arrive(self, pool: Pool, spec: PoolSpec, replicas: Mapping[str, Replica]) -> None:
        """The file of a pool's model is there: these are its replicas."""
        pool.spec, pool.is_arriving, pool.arrival_s = spec, False, None
        pool.replicas.update(replicas)
        self.replicas |= pool.replicas
        self._owners |= dict.fromkeys(replicas, pool)

    def forget_arriving(self, pool: Pool) -> None:
        """Its model does not come. Nobody waits for it any more."""
        pool.is_arriving = False
        if self.pools.get(pool.spec.pool_id) is pool and pool.spec.pool_id not in self.coming:
            del self.pools[pool.spec.pool_id]

    def dispose(self, pool: Pool) -> None:
        """Forget the replicas of a pool that nothing runs on."""
        for replica in pool.replicas.values():
            replica.mark_stopped()
            del self.replicas[replica.replica_id], self._owners[replica.replica_id]
            self._emit(Dispose(replica.replica_id))

    def remove(self, pool: Pool) -> None:
        """Forget a pool that is idle and unloaded."""
        del self.pools[pool.spec.pool_id]
        self.dispose(pool)

    def end(self) -> None:
        """The service ends: nothing is loaded any more."""
        self.is_ending = True
        for replica in self.replicas.values():
            if replica.is_promised or replica.state in (ReplicaState.BACKOFF, ReplicaState.UNLOADED):
                replica.mark_stopped()

    # -- what was seen -------------------------------------------------------------------------------------------------

    def device_seen(self, device_id: str, free_bytes: int, problem: str | None, *, is_lost: bool) -> bool:
        """What the device layer measured; True when the device was lost just now."""
        was_lost = self.ledger.devices[device_id].is_lost
        self.ledger.seen(device_id, free_bytes, problem, is_lost=is_lost)
        if was_lost or not is_lost:
            return False
        for replica in self.replicas.values():
            if device_id in replica.device_ids and replica.state is ReplicaState.READY:
                self.condemn_if_lost(replica)
        return True

    def condemn_if_lost(self, replica: Replica) -> None:
        """A worker whose card is lost cannot be trusted, whatever it says of itself."""
        if (device := self.ledger.lost_device(replica)) is not None:
            self._emit(Condemn(replica.replica_id, f"device {device.device_id} is lost: {device.problem}"))

    def lost_devices(self, pool: Pool) -> str | None:
        """Why the pool cannot serve, where each replica that it has left is on a device that is lost."""
        left = [r for r in pool.replicas.values() if r.state not in (ReplicaState.FAILED, ReplicaState.STOPPED)]
        gone = [self.ledger.lost_device(replica) for replica in left]
        if not left or None in gone:
            return None
        return "; ".join(dict.fromkeys(f"device {d.device_id} is lost: {d.problem}" for d in gone if d is not None))

    def busy_share(self, device_id: str) -> float:
        """The part of a device's slots that hold a task, from 0 to 1."""
        here = [r for r in self.replicas.values() if device_id in r.device_ids and r.state is ReplicaState.READY]
        slots = sum(replica.slots for replica in here)
        return sum(replica.slots_busy for replica in here) / slots if slots else 0.0

    def measured(self, replica_id: str, need_bytes: dict[str, int]) -> None:
        """What a loaded replica was seen to take, in place of what was predicted."""
        self.replicas[replica_id].measured(need_bytes)

    # -- what is loaded ------------------------------------------------------------------------------------------------

    def want(self, pool: Pool, now: float) -> None:
        """Somebody asked for the pool and could not be queued, because its model is not there to count tokens."""
        pool.wanted_until_s = now + WANTED_S
        self.revive(pool, now)

    def revive(self, pool: Pool, now: float) -> None:
        """What failed when it was loaded on demand gets another chance once its quarantine is over."""
        for replica in pool.replicas.values():
            over_s = _quarantined_until_s(replica)
            if over_s is not None and over_s <= now:
                replica.revive()

    def settle(self, now: float) -> None:
        """See that who is needed gets loaded and who is not makes room."""
        if self.is_ending:
            return
        self._settled_s = now
        self._see_off(now)
        for pool in self.every_pool():
            pool.why_not_loaded = None
        for pool in list(self.pools.values()):
            self._keep_pinned(pool, now)
        self._launch_promised(now)
        for pool in self._in_need(now):
            self._provide(pool, now)
        for pool in self.every_pool():
            self._judge(pool, now)

    def _judge(self, pool: Pool, now: float) -> None:
        """Whether there is hope for those who wait."""
        if not self.planner.is_hopeless(pool, now):
            pool.hopeless_since_s = None
            return
        if pool.hopeless_since_s is None:
            pool.hopeless_since_s = now
        if pool.why_not_loaded is None:
            left = [r for r in pool.replicas.values() if r.state not in (ReplicaState.FAILED, ReplicaState.STOPPED)]
            pool.why_not_loaded = residency.shortage(left, self.ledger)

    def _see_off(self, now: float) -> None:
        """Unload who is closing and has no work, and whose time has come."""
        for pool in list(self.every_pool()):
            for replica in pool.replicas.values():
                reason = replica.close_reason if replica.is_closing else self._why_unloaded(pool, replica, now)
                if reason and not replica.leases:
                    self.unload(replica, reason)
            if pool.is_draining and pool.spec.is_on_demand and pool.is_idle and not pool.is_loaded:
                pool.is_draining, pool.drain_until_s = False, None  # nothing is left of it: the next task begins anew

    def _why_unloaded(self, pool: Pool, replica: Replica, now: float) -> str | None:
        if pool.is_leaving and pool.is_idle:
            return "drain"
        keep_s = self._keep_alive_s(pool)
        if keep_s is None or replica.state is not ReplicaState.READY or self.planner.is_needed(pool, now):
            return None
        return "idle" if pool.is_idle and replica.last_used_s + keep_s <= now else None

    def _keep_alive_s(self, pool: Pool) -> float | None:
        """None where it is kept loaded: also while it waits for others of its kind to take an old model's place."""
        return None if self._is_to_come(pool) else pool.spec.keep_alive_s

    def _is_to_come(self, pool: Pool) -> bool:
        return self.coming.get(pool.spec.pool_id) is pool

    def unload(self, replica: Replica, reason: str) -> None:
        """End a replica that has no work. Nothing where nothing is loaded."""
        if replica.state in (ReplicaState.READY, ReplicaState.LOADING) and replica.is_launched:
            replica.mark_unloading()
            self._emit(Unload(replica.replica_id, reason))
        elif replica.state in (ReplicaState.BACKOFF, ReplicaState.LOADING):
            replica.mark_unloaded()

    def load(self, replica: Replica, now: float) -> None:
        """Start a replica for which there is room, with as many slots as there is room for."""
        if replica.state is not ReplicaState.BACKOFF and not replica.is_lingering:
            self._grow(replica)
        if replica.state is ReplicaState.LOADING:  # it was promised the room
            replica.is_launched, replica.loading_since_s = True, now
        else:
            replica.mark_loading(now)
        self._emit(Load(replica.replica_id))

    def _grow(self, replica: Replica) -> None:
        for slots in range(len(replica.sizes), 0, -1):
            replica.resize(slots)
            if self.ledger.has_room(replica):
                return

    def _launch_promised(self, now: float) -> None:
        """Load who was promised room, once it is there. If nobody who is leaving can make it, others are asked to."""
        for replica in sorted(self.replicas.values(), key=lambda r: r.promised_since_s or 0.0):
            if not replica.is_promised:
                continue
            if self.ledger.has_room(replica):
                self.load(replica, now)
            elif self.ledger.lacking_bytes(replica) or not self.ledger.is_sound(replica):
                self._ask_for_room(replica, now)  # who is leaving does not make enough of it

    def _ask_for_room(self, replica: Replica, now: float) -> None:
        """What is to stay loaded, or takes another model's place, goes before what was loaded on demand. Anybody else
        is planned anew: the room went to somebody that is not ours, perhaps."""
        pool = self.owner(replica)
        is_first = replica.is_pinned or self._is_to_come(pool)
        victims = self.planner.room_makers(replica, now) if is_first and self.ledger.is_sound(replica) else None
        if victims:
            self._close(victims)
        elif replica.is_pinned and not self._is_to_come(pool):
            pool.why_not_loaded = residency.shortage([replica], self.ledger)
        else:
            replica.mark_unloaded()

    def _close(self, victims: Sequence[Holder]) -> None:
        """They take no more tasks, and leave once they have none."""
        for victim in victims:
            victim.replica.is_closing, victim.replica.close_reason = True, "evicted"
            if not victim.replica.leases:
                self.unload(victim.replica, "evicted")

    def _keep_pinned(self, pool: Pool, now: float) -> None:
        """What is to stay loaded is loaded again as soon as there is room."""
        if pool.is_leaving or pool.spec.pool_id in self.coming:
            return
        for replica in pool.replicas.values():
            if replica.is_pinned and replica.state is ReplicaState.UNLOADED:
                replica.mark_loading(now, is_launched=False)

    def _in_need(self, now: float) -> list[Pool]:
        """Pools that tasks wait for while nobody comes, who waits longest first; and those whose queue is long enough
        to be worth another replica."""
        for pool in self.every_pool():
            if not self.planner.is_needed(pool, now) or pool.is_coming:
                pool.waiting_since_s = None
            else:
                pool.waiting_since_s = now if pool.waiting_since_s is None else pool.waiting_since_s
                self.revive(pool, now)  # the others may never find room
        pools = [
            pool for pool in self.every_pool() if pool.waiting_since_s is not None or self.planner.has_backlog(pool)
        ]
        return sorted(pools, key=lambda pool: (pool.waiting_since_s is None, pool.waiting_since_s or 0.0))

    def _provide(self, pool: Pool, now: float) -> None:
        """Load one replica of the pool, with as little disturbance as there can be."""
        candidates = loadable(pool)
        if not candidates:
            return
        proposal = self.planner.propose(pool, candidates, now)
        if proposal is None:
            if pool.waiting_since_s is not None:
                pool.why_not_loaded = residency.shortage(candidates, self.ledger)
            return
        self._close(proposal.victims)
        if self.ledger.has_room(proposal.replica):
            self.load(proposal.replica, now)
        else:
            proposal.replica.mark_loading(now, is_launched=False)

    @staticmethod
    def is_given_up(pool: Pool, now: float) -> bool:
        """Whether who waits for the pool's model has waited long enough for room that nobody of ours can make."""
        return pool.hopeless_since_s is not None and pool.hopeless_since_s + HOPE_S <= now

    def ran_short(self, replica: Replica, reason: str, now: float) -> None:
        """A load found less memory than was thought. What stays loaded tries again in time; what was loaded on demand
        is planned anew with a larger need, once, and is then given up on these devices."""
        if replica.is_pinned:
            replica.mark_lost(reason, now)
            return
        replica.mark_short(reason)
        replica.need_more(SHORTAGE_GROWTH)
        replica.shrink()
        growth = replica.need_growth
        is_hopeless = any(need * growth > self.ledger.capacity_bytes(d) for d, need in replica.need_bytes.items())
        if replica.shortages > SHORTAGES_MAX or is_hopeless:
            replica.give_up(now)

    # -- time ----------------------------------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Restarts that are due."""
        for replica in self.replicas.values():
            if replica.retry_at_s is None or replica.retry_at_s > now:
                continue
            pool = self.owner(replica)
            if not replica.is_pinned and not self.planner.is_needed(pool, now):
                replica.mark_unloaded()
            elif self.ledger.can_restart(replica):
                self.load(replica, now)
            elif replica.is_pinned:
                replica.retry_at_s = now + NO_PLACE_RETRY_S
            else:
                replica.mark_homeless()

    def next_due(self) -> float | None:
        """When `tick` or `settle` has something to do that no event brings."""
        hard: list[float] = []
        soft: list[float] = []  # what `settle` has looked at by then is no reason to wake again
        for pool in self.every_pool():
            keep_s = self._keep_alive_s(pool)
            for replica in pool.replicas.values():
                if replica.retry_at_s is not None:
                    hard.append(replica.retry_at_s)
                if keep_s is not None and replica.state is ReplicaState.READY and pool.is_idle:
                    soft.append(max(replica.last_used_s + keep_s, pool.wanted_until_s))
            if pool.hopeless_since_s is not None and len(pool.queue):
                soft.append(pool.hopeless_since_s + HOPE_S)
            if pool.waiting_since_s is not None:
                soft += self._due_of_a_wait(pool)
        return min([*hard, *(one for one in soft if one > self._settled_s)], default=None)

    def _due_of_a_wait(self, pool: Pool) -> Iterator[float]:
        """When somebody may be asked to make room for those who wait, or a quarantine is over."""
        for replica in pool.replicas.values():
            if (over_s := _quarantined_until_s(replica)) is not None:
                yield over_s
        candidates = [r for r in pool.replicas.values() if r.state is ReplicaState.UNLOADED]
        if not candidates or pool.waiting_since_s is None:
            return
        patience_s = self.planner.patience_s(candidates)
        yield pool.waiting_since_s + patience_s
        if not len(pool.queue):
            yield pool.wanted_until_s
        for replica in self.replicas.values():
            if replica.ready_since_s is not None and not replica.is_pinned:
                yield replica.ready_since_s + self._min_residency_s
                yield replica.ready_since_s + patience_s


def _quarantined_until_s(replica: Replica) -> float | None:
    """None where it is in none, or stays given up: it is to stay loaded, or fits nowhere."""
    return None if replica.is_pinned or replica.failed_at_s is None else replica.failed_at_s + QUARANTINE_S
