"""Another model in a pool's place, as a whole or not at all (HP-CTL-2).

Where the devices have room for both, the new model is loaded beside the old one. Else the old one finishes what it was
given, leaves, and the new one is loaded in its room; meanwhile the pool takes no new tasks, and no other reload takes
what room is left over, since the old one may have to come back. Either way a task runs on
the model that it was admitted for: the new model is a Pool of its own, with a queue of its own, that takes over the id
once all of its replicas serve. If one of them does not, the new ones leave and the old ones stay or come back.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from llama_orch.contract.models import ReplicaState
from llama_orch.core.fleet import Fleet
from llama_orch.core.pool import Pool
from llama_orch.core.replica import Replica
from llama_orch.core.residency import shortage


class Phase(StrEnum):
    """How far a rollout is."""

    BESIDE = "beside"  # the new replicas load while the old ones serve
    DRAINING = "draining"  # the old ones finish what they were given
    IN_PLACE = "in_place"  # the old ones leave, and the new ones load in their room


@dataclass(slots=True, eq=False)
class Rollout:
    """One reload under way."""

    old: Pool
    new: Pool
    phase: Phase = Phase.BESIDE


class Rollouts:
    """The reloads under way, at most one for each pool."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._by_pool: dict[str, Rollout] = {}

    def is_under_way(self, pool_id: str) -> bool:
        return pool_id in self._by_pool

    def begin(self, old: Pool, new: Pool, now: float) -> None:
        """All replicas of `new` are `unloaded`."""
        pool_id = old.spec.pool_id
        rollout = self._by_pool[pool_id] = Rollout(old, new)
        self._fleet.coming[pool_id] = new
        self._fleet.add(new)
        _promise(new, now)
        if not self._is_undecided_near(new) and self._fit_beside(new, now):
            old.last_reload = f"loading {new.spec.model} beside {old.spec.model}"
            return
        for replica in new.replicas.values():
            replica.mark_unloaded()
        rollout.phase = Phase.DRAINING
        old.is_paused = True
        old.last_reload = f"waiting for the tasks of {old.spec.model}, then loading {new.spec.model} in its place"

    def _is_undecided_near(self, new: Pool) -> bool:
        """Whether another old model, on one of the same devices, has left and may have to come back: until that is
        known nobody takes its room."""
        undecided = [one.old for one in self._by_pool.values() if one.phase is Phase.IN_PLACE and one.new is not new]
        return any(not _devices(new).isdisjoint(_devices(old)) for old in undecided)

    def _fit_beside(self, new: Pool, now: float) -> bool:
        """Whether all of them have room while the old ones stay, those that were loaded on demand and are idle left
        aside. Each has been promised its room, so they do not count on the same."""
        return all(self._has_room_beside(replica, now) for replica in new.replicas.values())

    def _has_room_beside(self, replica: Replica, now: float) -> bool:
        if self._fleet.ledger.has_room(replica):
            return True
        if not self._fleet.ledger.is_sound(replica):
            return False
        leaving = self._fleet.planner.room_makers(replica, now)
        return leaving is not None and not any(victim.is_busy for victim in leaving)

    def _fits_in_place(self, old: Pool, new: Pool) -> bool:
        """Whether there is room for all of them once the old ones have left, and what was loaded on demand."""
        ledger = self._fleet.ledger
        staying = [r for r in old.replicas.values() if r.is_staying]
        for device_id in _devices(new):
            need = sum(r.need_bytes.get(device_id, 0) for r in new.replicas.values())
            old_bytes = sum(r.need_bytes.get(device_id, 0) for r in staying)
            if need > ledger.contested_bytes(device_id) + old_bytes:
                return False
        return all(ledger.is_sound(r) for r in new.replicas.values())

    def of(self, replica: Replica) -> Rollout | None:
        """The rollout that brings this replica."""
        rollout = self._by_pool.get(replica.pool_id)
        return rollout if rollout is not None and replica.replica_id in rollout.new.replicas else None

    def came(self, replica: Replica) -> None:
        """One of the new replicas serves; with the last one the new model takes over."""
        rollout = self.of(replica)
        if rollout is not None and all(r.state is ReplicaState.READY for r in rollout.new.replicas.values()):
            self._take_over(rollout)

    def _take_over(self, rollout: Rollout) -> None:
        old, new = rollout.old, rollout.new
        pool_id = new.spec.pool_id
        del self._by_pool[pool_id], self._fleet.coming[pool_id]
        self._fleet.pools[pool_id] = new
        self._fleet.retiring.append(old)
        old.is_paused = True
        new.tokens_in, new.tokens_out = old.tokens_in, old.tokens_out
        new.last_reload = f"done: {new.spec.model} serves in place of {old.spec.model}"

    def failed(self, pool_id: str, reason: str, now: float) -> None:
        """The old model keeps its place: its replicas are there, or are loaded again. Nothing without a rollout."""
        rollout = self._by_pool.pop(pool_id, None)
        if rollout is None:
            return
        del self._fleet.coming[pool_id]
        self._fleet.retiring.append(rollout.new)
        rollout.old.is_paused = False
        rollout.old.last_reload = (
            f"failed: {rollout.new.spec.model}: {reason}; {rollout.old.spec.model} keeps its place"
        )
        if rollout.phase is Phase.IN_PLACE and not rollout.old.is_leaving:
            _promise(rollout.old, now)

    def settle(self, now: float) -> bool:
        """Take the steps that are due, and see off what has no work left. True where the fleet has to look again."""
        have_stepped = [self._step(rollout, now) for rollout in list(self._by_pool.values())]
        for pool in list(self._fleet.retiring):
            self._see_off(pool)
        return any(have_stepped)

    def _step(self, rollout: Rollout, now: float) -> bool:
        old, new = rollout.old, rollout.new
        if rollout.phase is Phase.DRAINING and old.is_idle and not self._is_undecided_near(new):
            if not self._fits_in_place(old, new):  # the old one need not leave in order to find that out
                self.failed(old.spec.pool_id, shortage(new.replicas.values(), self._fleet.ledger), now)
                return True
            rollout.phase = Phase.IN_PLACE
            old.last_reload = f"loading {new.spec.model} in place of {old.spec.model}"
            for replica in old.replicas.values():
                self._fleet.unload(replica, "reload")
            _promise(new, now)
            return True
        if rollout.phase is not Phase.DRAINING and any(r.state is ReplicaState.UNLOADED for r in new.replicas.values()):
            self.failed(old.spec.pool_id, shortage(new.replicas.values(), self._fleet.ledger), now)
            return True
        return False

    def _see_off(self, pool: Pool) -> None:
        if not pool.is_idle:
            return
        for replica in pool.replicas.values():
            self._fleet.unload(replica, "reload")
        if not pool.is_loaded:
            self._fleet.retiring.remove(pool)
            self._fleet.dispose(pool)


def _devices(pool: Pool) -> set[str]:
    return {device_id for replica in pool.replicas.values() for device_id in replica.device_ids}


def _promise(pool: Pool, now: float) -> None:
    """Keep room for the replicas: they are launched once those who are leaving have left."""
    for replica in pool.replicas.values():
        if replica.state is ReplicaState.UNLOADED:
            replica.mark_loading(now, is_launched=False)
