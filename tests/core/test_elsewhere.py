"""Pools whose model is on a server elsewhere: what the core makes of a replica without a device of its own."""

from __future__ import annotations

from typing import Any

import pytest

from llama_orch.contract.models import Determinism, KvHint, ReplicaState, Sampling, TaskState
from llama_orch.core import admission
from llama_orch.core.effects import Evict
from llama_orch.core.pool import Pool
from llama_orch.core.replica import BACKOFF_MAX_S, RESTARTS_MAX
from llama_orch.errors import InvalidParams, PoolUnready
from llama_orch.testing.builders import Host, a_device, a_pool, a_scheduler, a_task, an_outcome, on_demand, submit

THERE: dict[str, Any] = {
    "engine": "openai",
    "model": "openai:box/m",
    "masks": ((),),
    "strict_needs_exclusive": False,
    "can_be_strict": False,
    "features": ("chat",),
    "lacks": ("kv_hint", "sampling.top_k"),
}


def elsewhere(**fields: Any) -> Pool:
    pool = a_pool("far", **{**THERE, **fields})
    for replica in pool.replicas.values():
        replica.is_remote = True
    return pool


@pytest.mark.spec("HP-REM-6")
def test_strict_is_no_default_there_and_refused_by_name() -> None:
    """Nobody is refused for what he has not asked for. Elsewhere `strict` stays the default."""
    scheduler = a_scheduler(Host([a_device()], [elsewhere(), a_pool()]))
    far, near = scheduler.pools["far"], scheduler.pools["default"]
    asked = a_task(model_ref="openai:box/m", determinism=Determinism.STRICT)
    with pytest.raises(InvalidParams, match="`determinism` strict"):
        admission.matching_pools([far], asked)
    for free in (a_task(model_ref="openai:box/m"), a_task(model_ref="openai:box/m", determinism="best_effort")):
        assert admission.matching_pools([far], free) == [far]
    assert not submit(scheduler, "there", pool_id="far", model_ref="openai:box/m").task.is_strict
    assert submit(scheduler, "here").task.is_strict
    assert len(near.replicas["default-0"].leases) == 4
    assert len(far.replicas["far-0"].leases) == 1


@pytest.mark.spec("HP-REM-6")
@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"kv_hint": KvHint.COLD}, "`kv_hint`"),
        ({"kv_hint": KvHint.REUSE}, None),
        ({"sampling": Sampling(top_k=3)}, "`sampling.top_k`"),
        ({"sampling": Sampling(top_p=0.5)}, None),
        ({"sampling": Sampling(min_p=0.5)}, "`sampling.min_p`"),
    ],
)
def test_what_its_server_lacks_is_refused_by_name(fields: dict[str, Any], named: str | None) -> None:
    pool = elsewhere()
    request = a_task(model_ref="openai:box/m", **fields)
    if named is None:
        assert admission.matching_pools([pool], request) == [pool]
    else:
        with pytest.raises(InvalidParams, match=named):
            admission.matching_pools([pool], request)


@pytest.mark.spec("HP-REM-6")
def test_before_it_has_said_what_it_does_nothing_is_refused_for_good() -> None:
    pool = elsewhere(is_known=False)
    with pytest.raises(PoolUnready, match="has not reached its server yet"):
        admission.matching_pools([pool], a_task(model_ref="openai:box/m", sampling=Sampling(top_k=3)))
    assert admission.matching_pools([pool], a_task(model_ref="openai:box/m")) == [pool]


@pytest.mark.spec("HP-REM-3")
def test_it_is_never_given_up() -> None:
    """However often it is lost: others may mend it. The pauses end at 30 s."""
    pool = elsewhere()
    scheduler = a_scheduler(Host([a_device()], [pool]), is_ready=False)
    replica, now = pool.replicas["far-0"], 0.0
    for _ in range(RESTARTS_MAX + 5_000):
        scheduler.replica_lost("far-0", "it is away", now)
        assert replica.state is ReplicaState.BACKOFF
        assert replica.retry_at_s is not None
        assert replica.retry_at_s - now <= BACKOFF_MAX_S
        now = replica.retry_at_s
        scheduler.tick(now)
        assert replica.state is ReplicaState.LOADING
        scheduler.take_effects()
    assert replica.retry_at_s is None
    waiting = submit(scheduler, "t", now=now, pool_id="far", model_ref="openai:box/m").task
    scheduler.replica_ready("far-0", slots=2, model_digest=None, now=now)
    assert waiting.state is TaskState.RUNNING
    assert waiting.model_digest is None


@pytest.mark.spec("HP-REM-1")
def test_it_takes_no_room_and_makes_none() -> None:
    """A card that is full of idle models is emptied for another one; what is elsewhere is left alone, and is no load of
    the card."""
    far = elsewhere()
    others = [on_demand("a", 20), on_demand("b", 20)]
    scheduler = a_scheduler(Host([a_device()], [far, *others]))
    ledger = scheduler.fleet.ledger
    free = ledger.free_bytes("3090")
    submit(scheduler, "far", pool_id="far", model_ref="openai:box/m")
    assert ledger.free_bytes("3090") == free
    assert scheduler.fleet.busy_share("3090") == 0.0
    for now, name in ((1.0, "a"), (100.0, "b")):
        task = submit(scheduler, f"to-{name}", now=now, pool_id=name, model_ref=f"model-{name}").task
        for replica in scheduler.replicas.values():
            if replica.state is ReplicaState.UNLOADING:
                scheduler.replica_unloaded(replica.replica_id, now)
        scheduler.replica_ready(f"{name}-0", slots=4, model_digest="d", now=now)
        assert task.state is TaskState.RUNNING
        scheduler.cancel(task.task_id, now)
        scheduler.released(task.task_id, now)
    assert others[0].replicas["a-0"].state is ReplicaState.UNLOADED
    assert far.replicas["far-0"].state is ReplicaState.READY
    assert far.replicas["far-0"].slots_busy == 1


@pytest.mark.spec("HP-REM-1", "HP-SES-3")
def test_a_session_has_no_slot_there() -> None:
    """Nobody here knows what its server keeps, and nothing there can be erased."""
    scheduler = a_scheduler(Host([a_device()], [elsewhere()]))
    session = "6f1a5d6e-3f0e-4a51-9f3c-0c1f2b3a4d5e"
    submit(scheduler, "t", pool_id="far", model_ref="openai:box/m", session_id=session)
    scheduler.finished("t", an_outcome(), 1.0)
    assert scheduler.book.warmth(session) is None
    scheduler.book.delete(session)
    assert not [one for one in scheduler.take_effects() if isinstance(one, Evict)]
