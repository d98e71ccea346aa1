"""What sessions mean for the tasks and slots of one scheduler: who may enter, where the KV is, and when it goes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from llama_orch.contract.config import SessionsSettings
from llama_orch.contract.models import KvHint, ReplicaState
from llama_orch.core import refusals
from llama_orch.core.admission import writes
from llama_orch.core.affinity import Affinity, Warmth
from llama_orch.core.effects import Effect, Evict
from llama_orch.core.pool import Pool
from llama_orch.core.prediction import Predictor
from llama_orch.core.replica import Replica
from llama_orch.core.session import Sessions, Use
from llama_orch.core.task import Outcome, Task


class SessionBook:
    """Over the scheduler's own replicas and tasks."""

    def __init__(
        self,
        settings: SessionsSettings,
        replicas: Mapping[str, Replica],
        tasks: Mapping[str, Task],
        predictor: Predictor,
        emit: Callable[[Effect], None],
    ) -> None:
        self.sessions = Sessions(settings)
        self.affinity = Affinity()
        self._replicas = replicas
        self._tasks = tasks
        self._predictor = predictor
        self._emit = emit

    # -- admission -----------------------------------------------------------------------------------------------------

    def reserve(self, task: Task, prompt_tokens: Sequence[int], now: float) -> Use:
        """The most that the task may use; a refusal where that is more than its session has left, or where the session
        has ended (HP-ADM-7).

        How long it takes at most is known once tasks of its model were measured; before that it takes all that is left.
        """
        session_id, pool = task.request.session_id, task.pool
        if session_id is not None:
            self.sessions.check(session_id, now)
        left = self.sessions.left(session_id)
        time_s = 0.0
        if left.time_ms is not None:
            longest_s = self._predictor.longest_s(pool, task, sum(prompt_tokens))
            time_s = left.time_ms / 1000 if longest_s is None else longest_s
        use = Use(sum(prompt_tokens) + task.tokens_out_max, time_s)
        if session_id is not None and (shortage := self.sessions.shortage(session_id, use)) is not None:
            raise refusals.over_budget(pool, session_id, shortage, left, self._wait_ms(session_id, pool, now))
        return use

    def _wait_ms(self, session_id: str, pool: Pool, now: float) -> int:
        """Until the next of its tasks settles, which gives back what it does not use; without one, until it ends."""
        if session_id not in self.sessions:
            return self.sessions.settings.ttl_ms
        session = self.sessions.get(session_id)
        if session.reserved:
            return self._predictor.advice_ms(pool, self._tasks, now)
        return round(self.sessions.ttl_s(session, now) * 1000)

    def admit(self, task: Task, use: Use, now: float) -> None:
        for session_id in self.sessions.admit(task, use, now):
            self._evict(session_id)

    # -- slots ---------------------------------------------------------------------------------------------------------

    def session_for_kv(self, task: Task) -> str | None:
        """The session whose KV the task may take over. What only reads takes none over and leaves none."""
        is_cold = task.request.kv_hint is KvHint.COLD or not writes(task.request)
        return None if is_cold else task.request.session_id

    def warmth(self, session_id: str | None) -> Warmth | None:
        return self.affinity.warmth(session_id, self._replicas)

    def started(self, task: Task, replica: Replica) -> None:
        if task.lease is not None:
            own = task.request.session_id if writes(task.request) else None
            self.affinity.taken(own, replica, task.lease.slots[0])

    def ran(self, task: Task, replica: Replica, outcome: Outcome) -> None:
        """The slot that the task ran on holds its session's KV."""
        session_id = task.request.session_id
        if replica.is_remote:  # nobody here knows what its server keeps
            return
        if session_id in self.sessions and session_id is not None and task.lease is not None and writes(task.request):
            tokens = min(task.pool.spec.ctx, outcome.tokens_in + outcome.tokens_out)
            self.affinity.remember(session_id, replica, task.lease.slots[0], tokens)

    def let_go(self, task: Task, replica: Replica, slot: int) -> None:
        """The task's slot is free. A session that was deleted meanwhile, or has had its last turn, leaves nothing."""
        session_id = task.request.session_id
        if session_id is None:
            return
        if session_id not in self.sessions:
            self._erase(replica, slot)
            return
        session = self.sessions.get(session_id)
        if not session.reserved and not self.sessions.has_turns_left(session):
            self._evict(session_id)

    # -- ending --------------------------------------------------------------------------------------------------------

    def delete(self, session_id: str) -> Warmth | None:
        """End the session; where its KV was, if that is erased now."""
        self.sessions.delete(session_id)
        return self._evict(session_id)

    def expire(self, now: float) -> None:
        for session_id in self.sessions.expire(now):
            self._evict(session_id)

    def _evict(self, session_id: str) -> Warmth | None:
        warmth = self.warmth(session_id)
        self.affinity.forget(session_id)
        if warmth is None or not self._erase(self._replicas[warmth.replica_id], warmth.slot):
            return None
        return warmth

    def _erase(self, replica: Replica, slot: int) -> bool:
        """Have the engine forget what a slot holds on which nobody decodes: a strict task has the others of its replica
        as well, and leaves them as they are. One that is decoded on is seen to when its task lets go of it."""
        holder = self._tasks.get(replica.leases.get(slot, ""))
        is_decoded_on = holder is not None and holder.lease is not None and holder.lease.slots[0] == slot
        if replica.state is not ReplicaState.READY or is_decoded_on or slot >= replica.slots or replica.is_remote:
            return False
        replica.slot_used_s.pop(slot, None)
        self._emit(Evict(replica.replica_id, slot))
        return True
