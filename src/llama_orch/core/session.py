"""Sessions: how long they last, and what their tasks may still use (HP-SES-1, HP-SES-2, HP-SES-4).

A task reserves the most that it may use when it is admitted, in the step that admits it, and settles for what it did
use when it ends, however it ends. So tasks that run side by side cannot use more than there is.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from llama_orch.budgets import NO_BUDGETS, BudgetsLeft
from llama_orch.contract.config import BudgetsSettings, SessionsSettings
from llama_orch.core.task import Task
from llama_orch.errors import NotFound, SessionExpired

SESSIONS_MAX = 4096  # beyond it the session that was used the longest time ago ends
ENDED_KEPT = 16384  # of ended sessions, so that their next task is told


@dataclass(frozen=True, slots=True)
class Use:
    """Tokens of prompts and answers, and seconds on a slot."""

    tokens: int = 0
    time_s: float = 0.0

    def __add__(self, other: Use) -> Use:
        return Use(self.tokens + other.tokens, self.time_s + other.time_s)


@dataclass(slots=True)
class Session:
    """`reserved` is by task number, for the tasks of it that wait or run."""

    session_id: str
    last_used_s: float
    turns: int = 0
    used: Use = Use()
    reserved: dict[int, Use] = field(default_factory=dict)

    @property
    def committed(self) -> Use:
        return sum(self.reserved.values(), self.used)


class Sessions:
    """All that have not ended. `settings` are the configuration's."""

    def __init__(self, settings: SessionsSettings) -> None:
        self.settings = settings
        self._known: OrderedDict[str, Session] = OrderedDict()  # the one used the longest time ago first
        self._ended: OrderedDict[str, str] = OrderedDict()  # id -> why

    # -- reading -------------------------------------------------------------------------------------------------------

    def __contains__(self, session_id: str | None) -> bool:
        return session_id in self._known

    def get(self, session_id: str) -> Session:
        try:
            return self._known[session_id]
        except KeyError:
            why = self._ended.get(session_id, "its first task begins it, and it ends when it is not used for a while")
            raise NotFound(f"no session {session_id}: {why}") from None

    def ttl_s(self, session: Session, now: float) -> float:
        """Seconds until it ends unless it is used; all of its time while a task of it waits or runs."""
        ttl_s = self.settings.ttl_ms / 1000
        return ttl_s if session.reserved else max(0.0, session.last_used_s + ttl_s - now)

    def has_turns_left(self, session: Session) -> bool:
        return session.turns < self.settings.max_turns

    def left(self, session_id: str | None) -> BudgetsLeft:
        """What its tasks may still use: all of it for one that has not begun."""
        budgets = self.settings.budgets
        if session_id is None or budgets.mode == "off":
            return NO_BUDGETS
        session = self._known.get(session_id)
        return _left(budgets, Use() if session is None else session.committed)

    # -- a task's life -------------------------------------------------------------------------------------------------

    def check(self, session_id: str, now: float) -> None:
        """Refuse a task of a session that has ended."""
        session = self._known.get(session_id)
        if session is not None and not self.has_turns_left(session):
            raise _expired(session_id, f"it has had its {self.settings.max_turns} turns")
        if session is not None and self.ttl_s(session, now) <= 0:
            raise _expired(session_id, self._unused())
        if session is None and session_id in self._ended:
            raise _expired(session_id, self._ended[session_id])

    def shortage(self, session_id: str, use: Use) -> str | None:
        """Why a task that may use this much cannot be admitted, where budgets are enforced."""
        budgets, left = self.settings.budgets, self.left(session_id)
        if budgets.mode != "enforce":
            return None
        cost = _cost(budgets, use.tokens)
        if left.tokens is not None and use.tokens > left.tokens:
            return f"it may use {use.tokens} tokens, and {left.tokens} are left; ask for fewer `max_tokens`"
        if left.time_ms is not None and (use.time_s * 1000 > left.time_ms or not left.time_ms):
            return f"it may take {use.time_s * 1000:.0f} ms, and {left.time_ms} ms are left"
        if left.cost is not None and cost > left.cost:
            return f"it may cost {cost:.6g}, and {left.cost:.6g} are left; ask for fewer `max_tokens`"
        return None

    def admit(self, task: Task, use: Use, now: float) -> list[str]:
        """Count the turn and reserve what it may use. The sessions that had to end for this one."""
        session_id = task.request.session_id
        if session_id is None:
            return []
        session = self._known.setdefault(session_id, Session(session_id, now))
        session.turns += 1
        session.reserved[task.number] = use
        self._touch(session, now)
        return list(self._make_room())

    def settle(self, task: Task, now: float) -> None:
        """The task has ended: what it used in place of what it might have used. Nothing if its session was deleted."""
        session = self._known.get(task.request.session_id or "")
        if session is None or session.reserved.pop(task.number, None) is None:
            return
        if task.started_s is not None:
            session.used += Use((task.tokens_in or 0) + task.tokens_out, now - task.started_s)
        self._touch(session, now)

    # -- ending --------------------------------------------------------------------------------------------------------

    def delete(self, session_id: str) -> None:
        """Forget it, also that it has ended: its id may begin another one."""
        self._known.pop(session_id, None)
        self._ended.pop(session_id, None)

    def expire(self, now: float) -> list[str]:
        """End those whose time is over. Those that wait for their tasks are passed over."""
        over = []
        for session in self._known.values():
            if session.last_used_s + self.settings.ttl_ms / 1000 > now:
                break
            if self.ttl_s(session, now) <= 0:
                over.append(session.session_id)
        for session_id in over:
            self._end(session_id, self._unused())
        return over

    def next_due(self) -> float | None:
        """When the next one ends unless it is used."""
        idle = next((session for session in self._known.values() if not session.reserved), None)
        return None if idle is None else idle.last_used_s + self.settings.ttl_ms / 1000

    def _touch(self, session: Session, now: float) -> None:
        session.last_used_s = now
        self._known.move_to_end(session.session_id)

    def _make_room(self) -> Iterator[str]:
        excess = len(self._known) - SESSIONS_MAX
        idle = [session.session_id for session in self._known.values() if not session.reserved] if excess > 0 else []
        for session_id in idle[:excess]:
            self._end(session_id, f"{SESSIONS_MAX} others were used since its last task")
            yield session_id

    def _end(self, session_id: str, why: str) -> None:
        del self._known[session_id]
        self._ended[session_id] = why
        if len(self._ended) > ENDED_KEPT:
            self._ended.popitem(last=False)

    def _unused(self) -> str:
        return f"it has ended, not used for {self.settings.ttl_ms / 1000:g} s"


def _left(budgets: BudgetsSettings, committed: Use) -> BudgetsLeft:
    return BudgetsLeft(
        tokens=None if budgets.tokens is None else max(0, budgets.tokens - committed.tokens),
        time_ms=None if budgets.time_ms is None else max(0, budgets.time_ms - round(committed.time_s * 1000)),
        cost=None if budgets.cost is None else round(max(0.0, budgets.cost - _cost(budgets, committed.tokens)), 9),
    )


def _cost(budgets: BudgetsSettings, tokens: int) -> float:
    return budgets.cost_per_1k_tokens * tokens / 1000


def _expired(session_id: str, why: str) -> SessionExpired:
    return SessionExpired(
        f"session {session_id}: {why}; go on in a new session, or delete this one to use its id again"
    )
