"""Sessions: how long they last, and what their tasks may use (HP-SES-1, HP-SES-2, HP-SES-4)."""

from __future__ import annotations

from typing import Any

import pytest

from llama_orch.budgets import NO_BUDGETS, BudgetsLeft
from llama_orch.contract.config import BudgetsSettings, SessionsSettings
from llama_orch.contract.models import Determinism, TaskState, Workload
from llama_orch.core import session
from llama_orch.core.effects import Effect, Evict
from llama_orch.core.scheduler import Scheduler
from llama_orch.errors import AdmissionReject, BudgetExhausted, LlorchError, NotFound, SessionExpired
from llama_orch.testing.builders import a_scheduler, an_outcome, submit

SHARED = Determinism.BEST_EFFORT


def with_budgets(mode: str = "enforce", **limits: Any) -> SessionsSettings:
    return SessionsSettings(max_turns=100, budgets=BudgetsSettings(mode=mode, **limits))  # type: ignore[arg-type]


def evictions(scheduler: Scheduler) -> list[Effect]:
    return [effect for effect in scheduler.take_effects() if isinstance(effect, Evict)]


def turn(scheduler: Scheduler, task_id: str, now: float, session_id: str = "s", **outcome: Any) -> None:
    """A task of the session from its admission to its end, half a second later."""
    submit(scheduler, task_id, now=now, session_id=session_id, determinism=SHARED)
    scheduler.finished(task_id, an_outcome(**outcome), now + 0.5)


def left(scheduler: Scheduler, session_id: str = "s") -> BudgetsLeft:
    return scheduler.book.sessions.left(session_id)


def refusal(scheduler: Scheduler, now: float = 0.0, **fields: Any) -> LlorchError:
    with pytest.raises(LlorchError) as caught:
        submit(scheduler, "refused", now=now, session_id="s", **fields)
    assert "refused" not in scheduler.tasks
    return caught.value


# -- how long it lasts -------------------------------------------------------------------------------------------------


@pytest.mark.spec("HP-SES-2")
def test_a_session_ends_when_it_is_not_used_for_a_while() -> None:
    """Its KV is evicted at that very time, its next task is told, and so is who reads it."""
    scheduler = a_scheduler()
    turn(scheduler, "t1", 1.0)
    assert scheduler.book.sessions.ttl_s(scheduler.book.sessions.get("s"), 101.5) == 500.0
    assert scheduler.next_due() == 601.5
    scheduler.tick(601.0)
    assert evictions(scheduler) == []
    scheduler.tick(601.5)
    assert evictions(scheduler) == [Evict("default-0", 0)]
    error = refusal(scheduler, 602.0)
    assert isinstance(error, SessionExpired)
    assert "not used for 600 s; go on in a new session" in error.message
    with pytest.raises(NotFound, match="not used for 600 s"):
        scheduler.book.sessions.get("s")


@pytest.mark.spec("HP-SES-2")
def test_an_expired_session_is_refused_before_anybody_looked() -> None:
    """The clock decides, not when the scheduler was woken."""
    scheduler = a_scheduler()
    turn(scheduler, "t1", 1.0)
    assert isinstance(refusal(scheduler, 700.0), SessionExpired)


@pytest.mark.spec("HP-SES-2")
def test_time_stands_still_while_a_task_waits_or_runs() -> None:
    """An hour in the queue costs no session."""
    scheduler = a_scheduler()
    submit(scheduler, "long", now=1.0, session_id="s")
    scheduler.tick(3600.0)
    assert scheduler.book.sessions.ttl_s(scheduler.book.sessions.get("s"), 3600.0) == 600.0
    scheduler.finished("long", an_outcome(), 4000.0)
    turn(scheduler, "next", 4599.0)
    assert scheduler.book.sessions.get("s").turns == 2


@pytest.mark.spec("HP-SES-2")
def test_a_session_has_so_many_turns() -> None:
    """The KV goes with the end of the last one; the next task is told; what was refused was no turn."""
    scheduler = a_scheduler(sessions=SessionsSettings(max_turns=2))
    turn(scheduler, "t1", 1.0)
    with pytest.raises(LlorchError):
        submit(scheduler, "too long", now=2.0, session_id="s", prompt_tokens=(5000,))
    assert evictions(scheduler) == []
    turn(scheduler, "t2", 3.0)
    assert evictions(scheduler) == [Evict("default-0", 0)]
    assert scheduler.book.sessions.get("s").turns == 2
    assert "had its 2 turns" in refusal(scheduler, 4.0).message


@pytest.mark.spec("HP-ADM-8")
def test_a_repeat_is_no_turn_and_reserves_nothing() -> None:
    """The same task again, be it that the session has ended since."""
    scheduler = a_scheduler(sessions=SessionsSettings(max_turns=1, budgets=BudgetsSettings(mode="enforce", tokens=300)))
    submit(scheduler, "once", session_id="s")
    before = left(scheduler)
    assert submit(scheduler, "once", session_id="s").is_repeat
    assert (scheduler.book.sessions.get("s").turns, left(scheduler)) == (1, before)


@pytest.mark.spec("HP-SES-1")
def test_a_deleted_session_leaves_nothing() -> None:
    """Its KV is evicted, its id may begin another one, and a second time does nothing."""
    scheduler = a_scheduler(sessions=SessionsSettings(max_turns=1))
    turn(scheduler, "t1", 1.0)
    scheduler.take_effects()
    turn(scheduler, "other", 2.0, session_id="o")
    assert refusal(scheduler, 3.0).message.startswith("session s: it has had")
    scheduler.take_effects()
    scheduler.book.delete("s")
    scheduler.book.delete("s")
    scheduler.book.delete("never was")
    assert evictions(scheduler) == []  # it went with its last turn
    turn(scheduler, "anew", 4.0)
    assert scheduler.book.sessions.get("s").turns == 1


@pytest.mark.spec("HP-SES-1")
def test_a_session_that_is_deleted_while_it_runs_is_erased_afterwards() -> None:
    """Its task goes on; what it leaves on the slot is nobody's."""
    scheduler = a_scheduler()
    submit(scheduler, "runs", now=1.0, session_id="s")
    assert scheduler.book.delete("s") is None
    assert evictions(scheduler) == []
    scheduler.finished("runs", an_outcome(), 2.0)
    assert evictions(scheduler) == [Evict("default-0", 0)]
    assert "s" not in scheduler.book.sessions
    assert scheduler.tasks["runs"].state is TaskState.SUCCEEDED


@pytest.mark.spec("HP-SES-1")
def test_a_session_is_erased_beside_a_strict_task_that_has_all_slots() -> None:
    """It decodes on one of them only; the one that it decodes on has nothing of the session any more."""
    scheduler = a_scheduler()
    turn(scheduler, "t1", 1.0)
    submit(scheduler, "strict", now=2.0)
    task = scheduler.tasks["strict"]
    assert task.lease is not None
    assert (task.lease.slots[0], sorted(task.lease.slots)) == (1, [0, 1, 2, 3])
    scheduler.take_effects()
    scheduler.book.delete("s")
    assert evictions(scheduler) == [Evict("default-0", 0)]
    assert task.state is TaskState.RUNNING


@pytest.mark.spec("HP-SES-1")
def test_a_task_of_a_deleted_session_settles_nothing_of_the_next_one() -> None:
    """The id was begun anew meanwhile."""
    scheduler = a_scheduler(sessions=with_budgets(tokens=1000))
    submit(scheduler, "old", now=1.0, session_id="s", determinism=SHARED)
    scheduler.book.delete("s")
    submit(scheduler, "new", now=2.0, session_id="s", determinism=SHARED)
    scheduler.finished("old", an_outcome(tokens_out=200), 3.0)
    assert left(scheduler).tokens == 1000 - 10 - 256


def test_so_many_sessions_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that was used the longest time ago ends for a new one, is evicted, and told so; one with a task in hand
    does not."""
    monkeypatch.setattr(session, "SESSIONS_MAX", 2)
    scheduler = a_scheduler()
    submit(scheduler, "waits", now=0.5, session_id="busy", determinism=SHARED)
    turn(scheduler, "t1", 1.0, "s")
    turn(scheduler, "t2", 2.0, "t")
    assert evictions(scheduler) == [Evict("default-0", 1)]
    assert "2 others were used since" in refusal(scheduler, 3.0).message
    assert "busy" in scheduler.book.sessions


# -- what it may use ---------------------------------------------------------------------------------------------------


@pytest.mark.spec("HP-SES-4", "HP-ADM-7")
def test_a_task_reserves_what_it_may_use_and_settles_for_what_it_used() -> None:
    """So tasks side by side cannot use more than there is, though each alone would fit."""
    scheduler = a_scheduler(sessions=with_budgets(tokens=500))
    submit(scheduler, "one", session_id="s", determinism=SHARED)
    assert left(scheduler).tokens == 500 - 10 - 256
    error = refusal(scheduler, determinism=SHARED)
    assert isinstance(error, BudgetExhausted)
    assert "may use 266 tokens, and 234 are left; ask for fewer `max_tokens`" in error.message
    assert (error.policy_label, error.left) == ("budget", left(scheduler))
    assert error.headers()["X-Budget-Tokens-Remaining"] == "234"
    scheduler.finished("one", an_outcome(tokens_in=10, tokens_out=20), 1.0)
    assert left(scheduler).tokens == 470
    submit(scheduler, "two", now=2.0, session_id="s", determinism=SHARED)


@pytest.mark.spec("HP-SES-4")
@pytest.mark.parametrize("ending", ["cancel", "fail", "lose", "deadline", "cancel queued", "drop"])
def test_every_end_settles(ending: str) -> None:
    """What was used is what was read and decoded by then; who never started has used nothing."""
    scheduler = a_scheduler(sessions=with_budgets(tokens=5000), queue_capacity=1, full_policy="drop-lru")
    is_queued = ending in ("cancel queued", "drop")
    if is_queued:
        submit(scheduler, "ahead")
    submit(scheduler, "it", session_id="s", deadline_ms=60_000 if ending == "deadline" else None)
    assert left(scheduler).tokens == 5000 - 266
    scheduler.progressed("it", 7)
    match ending:
        case "cancel" | "cancel queued":
            scheduler.cancel("it", 1.0)
        case "fail":
            scheduler.failed("it", AdmissionReject("no"), 1.0)
        case "lose":
            scheduler.replica_lost("default-0", "gone", 1.0)
        case "deadline":
            scheduler.tick(60.0)
        case "drop":
            submit(scheduler, "newer", now=1.0)
    assert scheduler.tasks["it"].state in (TaskState.CANCELED, TaskState.FAILED)
    assert left(scheduler).tokens == (5000 if is_queued else 5000 - 10 - 7)
    assert not scheduler.book.sessions.get("s").reserved


@pytest.mark.spec("HP-SES-4")
def test_who_finds_no_place_reserves_nothing() -> None:
    """A full queue is no use of a budget, and no turn."""
    scheduler = a_scheduler(sessions=with_budgets(tokens=5000), queue_capacity=0)
    submit(scheduler, "ahead")
    assert isinstance(refusal(scheduler), AdmissionReject)
    assert (left(scheduler).tokens, "s" in scheduler.book.sessions) == (5000, False)


@pytest.mark.spec("HP-SES-4")
def test_time_is_that_on_a_slot() -> None:
    """Before anything was measured a task takes all of it; then the time that its longest answer would take."""
    scheduler = a_scheduler(sessions=with_budgets(time_ms=20_000))
    submit(scheduler, "first", session_id="s", determinism=SHARED)
    assert left(scheduler).time_ms == 0
    assert "0 ms are left" in refusal(scheduler, determinism=SHARED).message
    scheduler.finished("first", an_outcome(), 1.0)
    assert left(scheduler).time_ms == 19_000
    turn(scheduler, "second", 2.0)
    submit(scheduler, "third", now=3.0, session_id="s", max_tokens=40)
    assert left(scheduler).time_ms == pytest.approx(18_500 - 40 * 50 * 0.75, abs=2)  # 20 tokens in 1.0 and in 0.5 s
    assert "may take" in refusal(scheduler, 3.0, max_tokens=1000).message
    scheduler.finished("third", an_outcome(), 4.0)
    assert left(scheduler).time_ms == 17_500


@pytest.mark.spec("HP-SES-4")
def test_cost_follows_the_tokens() -> None:
    """By the price of a thousand."""
    scheduler = a_scheduler(sessions=with_budgets(cost=1.0, cost_per_1k_tokens=2.0))
    turn(scheduler, "t1", 1.0, tokens_in=10, tokens_out=90)
    assert left(scheduler) == BudgetsLeft(None, None, 0.8)
    assert left(scheduler).headers() == {"X-Budget-Cost-Remaining": "0.8"}
    assert "may cost 0.82, and 0.8 are left" in refusal(scheduler, 2.0, max_tokens=400).message


@pytest.mark.spec("HP-SES-4")
def test_an_advisory_budget_refuses_nothing() -> None:
    """It is shown, and does not go below 0."""
    scheduler = a_scheduler(sessions=with_budgets("advisory", tokens=100))
    for n in range(5):
        turn(scheduler, f"t{n}", float(n), tokens_out=30)
    assert left(scheduler).tokens == 0


@pytest.mark.spec("HP-SES-4")
@pytest.mark.parametrize("settings", [with_budgets("off", tokens=1), with_budgets(), SessionsSettings()])
def test_no_budget_is_in_force(settings: SessionsSettings) -> None:
    """By mode, or because there is no limit: nothing is shown."""
    scheduler = a_scheduler(sessions=settings)
    turn(scheduler, "t", 1.0)
    assert left(scheduler) == NO_BUDGETS
    assert left(scheduler).headers() == {}


@pytest.mark.spec("HP-ERR-2")
def test_the_wait_of_a_refusal_is_that_for_what_is_reserved() -> None:
    """While a task of the session runs, its end may give tokens back; else only the session's end does."""
    scheduler = a_scheduler(sessions=with_budgets(tokens=300))
    submit(scheduler, "one", session_id="s", determinism=SHARED)
    running = refusal(scheduler, determinism=SHARED)
    scheduler.finished("one", an_outcome(tokens_out=200), 1.0)
    idle = refusal(scheduler, 101.0)
    assert running.retry_after_ms is not None
    assert idle.retry_after_ms == 500_000
    assert running.retry_after_ms < idle.retry_after_ms


@pytest.mark.spec("HP-SES-3", "HP-SES-4")
def test_what_only_reads_uses_its_input_and_leaves_no_kv() -> None:
    """An embedding reserves no answer. Whose KV was on its slot has lost it, its own session included."""
    scheduler = a_scheduler(slots=1, workloads=("completion", "embedding"), sessions=with_budgets(tokens=1000))
    turn(scheduler, "t1", 0.0, tokens_in=10, tokens_out=20)
    assert scheduler.book.warmth("s") is not None
    reads = {"workload": Workload.EMBEDDING, "inputs": ["a", "b"], "session_id": "s", "determinism": SHARED}
    submit(scheduler, "t2", now=1.0, prompt_tokens=(30, 40), **reads)
    assert left(scheduler).tokens == 1000 - 30 - 70
    assert scheduler.book.warmth("s") is None
    scheduler.finished("t2", an_outcome(tokens_in=70, tokens_out=0, decode_ms=0, prefill_ms=100.0), 1.5)
    assert left(scheduler).tokens == 1000 - 30 - 70
    assert scheduler.book.warmth("s") is None
