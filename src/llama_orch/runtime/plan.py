"""From settings to pools: which replica of which model goes on which devices. Runs once, at the start."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from llama_orch.contract.config import PoolSettings, Settings
from llama_orch.core.pool import Device, Pool, PoolSpec, Replica
from llama_orch.core.queue import TaskQueue
from llama_orch.devices.inventory import Source
from llama_orch.engines.base import Engine, ReplicaSpec
from llama_orch.models.gguf import GgufError, read_gguf_header
from llama_orch.models.references import ModelNotFound, resolve
from llama_orch.runtime.fit import Ledger


class PlanError(Exception):
    """The settings cannot be served on this machine. `problems` are sentences for the user."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run. Every replica of `pools` has its engine and spec in `replicas`."""

    pools: list[Pool]
    devices: list[Device]
    replicas: dict[str, tuple[Engine, ReplicaSpec]]


def make_plan(settings: Settings, engines: Mapping[str, Engine], sources: Sequence[Source]) -> Plan:
    problems: list[str] = []
    ledger = Ledger()
    plan = Plan([], [source.device for source in sources], {})
    for pool in settings.pools:
        problem = _pool_problem(pool, engines, sources)
        if problem is None:
            _add_pool(plan, pool, engines[pool.engine], sources, ledger)
        else:
            problems.append(f"pool {pool.id}: {problem}")
    if problems:
        raise PlanError(problems)
    _share_threads(plan)
    return plan


def _pool_problem(pool: PoolSettings, engines: Mapping[str, Engine], sources: Sequence[Source]) -> str | None:
    if pool.engine not in engines:
        hint = "; install it with: pip install 'llama-orch[ctransformers]'" if pool.engine == "ctransformers" else ""
        return f"engine {pool.engine!r} is not installed here{hint}"
    try:
        path = resolve(pool.model)
    except ModelNotFound as error:
        return str(error)
    known = {source.device.device_id for source in sources}
    missing = [] if pool.devices == "auto" else [one for one in pool.devices if one not in known]
    if missing:
        return f"there is no device {', '.join(missing)}; this machine has: {', '.join(sorted(known))}"
    return engines[pool.engine].refusal(path) or _context_problem(pool, path)


def _context_problem(pool: PoolSettings, path: Path) -> str | None:
    """llama.cpp would quietly grant less; a context that was asked for is never lowered in silence."""
    try:
        trained = read_gguf_header(path).context_length
    except GgufError:
        return None  # the engine takes the file all the same: a simulated one reads none
    if trained is None or pool.ctx <= trained:
        return None
    return f"ctx is {pool.ctx} tokens, but the model was trained with {trained}; set ctx to at most {trained}"


def _add_pool(plan: Plan, pool: PoolSettings, engine: Engine, sources: Sequence[Source], ledger: Ledger) -> None:
    slots = min(pool.slots, engine.traits.max_slots or pool.slots)
    replicas: dict[str, Replica] = {}
    path = resolve(pool.model)
    claims = [(mask, ledger.claim(mask, pool, path, slots)) for mask in _masks(pool, sources)]
    if pool.replicas == "auto" and any(problem is None for _, problem in claims):
        claims = [(mask, problem) for mask, problem in claims if problem is None]  # one on each device that holds it
    for number, (mask, problem) in enumerate(claims):
        replica_id = f"{pool.id}-{number}"
        replica = Replica(replica_id, pool.id, tuple(one.device.device_id for one in mask), slots)
        if problem is not None:
            replica.refuse(problem)
        replicas[replica_id] = replica
        plan.replicas[replica_id] = (engine, _replica_spec(replica_id, pool, slots, mask))
    spec = PoolSpec(
        pool_id=pool.id,
        engine=pool.engine,
        engine_version=engine.traits.version,
        model=pool.model,
        workloads=engine.traits.workloads,
        features=engine.traits.features,
        slots=slots,
        ctx=pool.ctx,
        max_tokens=pool.max_tokens,
        sampler_profile_version=pool.sampler_profile_version,
        queue_capacity=pool.queue.capacity,
        full_policy=pool.queue.full_policy,
        strict_needs_exclusive=engine.traits.strict_needs_exclusive,
    )
    plan.pools.append(Pool(spec, TaskQueue(pool.queue.capacity, pool.queue.full_policy), replicas))


def _masks(pool: PoolSettings, sources: Sequence[Source]) -> list[list[Source]]:
    """The devices of each replica: one device each, in turn; all of them together only where a split was asked for."""
    by_id = {source.device.device_id: source for source in sources}
    # In the pool's own order, which `tensor_split` counts by.
    usable = list(sources) if pool.devices == "auto" else [by_id[device_id] for device_id in pool.devices]
    if pool.tensor_split is not None:
        return [usable]
    count = len(usable) if pool.replicas == "auto" else pool.replicas
    return [[usable[number % len(usable)]] for number in range(count)]


def _replica_spec(replica_id: str, pool: PoolSettings, slots: int, mask: list[Source]) -> ReplicaSpec:
    return ReplicaSpec(
        replica_id=replica_id,
        pool_id=pool.id,
        model_path=resolve(pool.model),
        slots=slots,
        ctx=pool.ctx,
        backend=mask[0].backend,
        device_uuids=tuple(source.uuid for source in mask if source.uuid is not None),
        tensor_split=tuple(pool.tensor_split or ()),
    )


def _share_threads(plan: Plan) -> None:
    """Replicas that compute on the CPU share its cores; one thread serves a card."""
    cores = len(os.sched_getaffinity(0))
    on_cpu = sum(spec.backend != "cuda" for _, spec in plan.replicas.values())
    for replica_id, (engine, spec) in plan.replicas.items():
        threads = 1 if spec.backend == "cuda" else max(1, cores // on_cpu)
        plan.replicas[replica_id] = (engine, replace(spec, threads=threads))
