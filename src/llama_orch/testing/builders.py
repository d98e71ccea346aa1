"""Builders of small, valid things: a test names what it is about and leaves out the rest.

Everything is fixed: equal calls build equal things.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llama_orch.contract.config import SessionsSettings
from llama_orch.contract.models import FinishReason, ReplicaState, TaskRequest
from llama_orch.core.ledger import Device
from llama_orch.core.pool import Pool, PoolSpec
from llama_orch.core.queue import TaskQueue
from llama_orch.core.replica import Replica
from llama_orch.core.scheduler import Scheduler
from llama_orch.core.task import Outcome, Verdict

GIB = 2**30
CARDS_GIB = {"3090": 24, "3060": 12, "4090": 24, "cpu": 64}
MODEL = "builtin:tiny"
DIGEST = "sha256:" + "0" * 64


@dataclass(frozen=True, slots=True)
class Host:
    """A workstation: its devices, and the pools on them."""

    devices: list[Device]
    pools: list[Pool]


def a_task(**overrides: Any) -> TaskRequest:
    """A strict interactive completion of a short prompt. `messages` or `inputs` take the prompt's place."""
    prompt = None if overrides.keys() & {"inputs", "messages"} else "Once upon a time"
    return TaskRequest(**{"model_ref": MODEL, "prompt": prompt, **overrides})


def an_outcome(**overrides: Any) -> Outcome:
    """20 tokens in one second."""
    fields: dict[str, Any] = {
        "tokens_in": 10,
        "tokens_out": 20,
        "decode_ms": 1000,
        "finish_reason": FinishReason.STOP,
        "is_kv_warm": False,
    }
    return Outcome(**{**fields, **overrides})


def a_device(device_id: str = "3090", *, vram_gib: float | None = None) -> Device:
    """A card by its name, all of its memory free; "3090-2" is one more 3090."""
    gib = CARDS_GIB[device_id.split("-")[0]] if vram_gib is None else vram_gib
    return Device(device_id, f"Simulated {device_id}", "simulated", int(gib * GIB), int(gib * GIB))


def a_spec(**overrides: Any) -> PoolSpec:
    fields: dict[str, Any] = {
        "pool_id": "default",
        "engine": "llamacpp",
        "engine_version": "1.0",
        "model": MODEL,
        "workloads": ("completion",),
        "features": ("chat", "json_schema", "grammar", "min_p"),
        "slots": 4,
        "ctx": 2048,
        "max_tokens": 256,
        "sampler_profile_version": "v1",
        "queue_capacity": 64,
        "full_policy": "reject",
        "strict_needs_exclusive": True,
    }
    return PoolSpec(**{**fields, **overrides})


def a_pool(
    pool_id: str = "default",
    *,
    masks: Sequence[Sequence[str]] = (("3090",),),
    need_gib: float | None = None,
    state: ReplicaState = ReplicaState.LOADING,
    first_number: int = 0,
    **spec: Any,
) -> Pool:
    """A pool with one replica, still loading, for each device mask: "default-0", "default-1" and so on. Each takes
    `need_gib`, shared by its devices; nobody knows how much without. With `keep_alive_s` they do not stay loaded."""
    fixed = a_spec(pool_id=pool_id, **spec)
    replicas = []
    for n, mask in enumerate(masks, first_number):
        need = {} if need_gib is None else dict.fromkeys(mask, int(need_gib * GIB / len(mask)))
        is_pinned = fixed.keep_alive_s is None
        replicas.append(Replica(f"{pool_id}-{n}", pool_id, tuple(mask), fixed.slots, state, need, is_pinned=is_pinned))
    return Pool(fixed, TaskQueue(fixed.queue_capacity, fixed.full_policy), {r.replica_id: r for r in replicas})


def on_demand(pool_id: str, need_gib: float, *, keep_alive_s: float = 900.0, **fields: Any) -> Pool:
    """A pool whose model is loaded when a task needs it."""
    fields = {"model": f"model-{pool_id}", "state": ReplicaState.UNLOADED, "is_on_demand": True, **fields}
    return a_pool(pool_id, need_gib=need_gib, keep_alive_s=keep_alive_s, **fields)


def a_host(cards: str = "3090", **spec: Any) -> Host:
    """ "3090+3060": both cards, and one pool with a replica on each. "3090+3090": the second one's id is "3090-2"."""
    ids: list[str] = []
    for card in cards.split("+"):
        count = sum(1 for known in ids if known.split("-")[0] == card)
        ids.append(card if count == 0 else f"{card}-{count + 1}")
    return Host([a_device(device_id) for device_id in ids], [a_pool(masks=[(i,) for i in ids], **spec)])


def a_scheduler(
    host: Host | None = None,
    *,
    retain_s: float = 600.0,
    is_ready: bool = True,
    sessions: SessionsSettings | None = None,
    **spec: Any,
) -> Scheduler:
    """On `host`, or one 3090 with a pool of `spec`. All replicas are ready at 0.0 unless told otherwise."""
    host = a_host(**spec) if host is None else host
    scheduler = Scheduler(host.pools, host.devices, retain_s=retain_s, sessions=sessions)
    if is_ready:
        for replica in [r for r in scheduler.replicas.values() if r.state is ReplicaState.LOADING]:
            scheduler.replica_ready(replica.replica_id, slots=replica.slots, model_digest=DIGEST, now=0.0)
    return scheduler


def submit(
    scheduler: Scheduler,
    task_id: str,
    *,
    now: float = 0.0,
    pool_id: str = "default",
    prompt_tokens: Sequence[int] = (10,),
    are_tokens_exact: bool = True,
    **overrides: Any,
) -> Verdict:
    """Submit `a_task(**overrides)` under this id, seed 1."""
    return scheduler.submit(
        a_task(task_id=task_id, **overrides),
        task_id=task_id,
        seed=1,
        pool_id=pool_id,
        prompt_tokens=prompt_tokens,
        are_tokens_exact=are_tokens_exact,
        correlation_id=f"correlation-{task_id}",
        now=now,
    )
