"""The metrics against the state: what a scrape says must be what is true at that moment (HP-OBS-1)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from llama_orch.contract.models import ReplicaState, TaskState
from llama_orch.testing.checks import Checker
from llama_orch.testing.stage import Stage

_label = re.compile(r'(\w+)="([^"]*)"')

Reading = dict[tuple[str, ...], float]


def scrape(stage: Stage, *, by: dict[str, tuple[str, ...]]) -> dict[str, Reading]:
    """Metrics of these names, each summed up over all labels but those."""
    found: dict[str, Reading] = {name: {} for name in by}
    for line in stage.service.metrics_text().decode().splitlines():
        # By hand: prometheus_client's parser takes half of a simulation's time, and these labels hold no quotes.
        name, _, rest = line.rpartition(" ")[0].partition("{")
        if name in by:
            labels = dict(_label.findall(rest))
            key = tuple(labels[label] for label in by[name])
            found[name][key] = found[name].get(key, 0.0) + float(line.rpartition(" ")[2])
    return found


BY = {
    "queue_depth": ("pool_id", "priority"),
    "slots_busy": ("replica_id",),
    "replica_ready": ("replica_id",),
    "streams_open": (),
    "tasks_enqueued_total": ("pool_id",),
    "tasks_started_total": ("pool_id",),
    "tasks_finished_total": ("pool_id", "state"),
}


def problems(stage: Stage, checker: Checker) -> Iterator[str]:
    """Where a scrape and the state differ. Counters are compared with what the checker has counted."""
    scheduler = stage.scheduler
    said = scrape(stage, by=BY)
    waiting = Counter(
        (task.pool_id, task.priority.value) for task in scheduler.tasks.values() if task.state is TaskState.QUEUED
    )
    busy: Counter[tuple[str]] = Counter()
    for task in scheduler.tasks.values():
        if task.lease is not None:
            busy[task.lease.replica_id,] += len(task.lease.slots)
    replicas = [replica for pool in scheduler.fleet.every_pool() for replica in pool.replicas.values()]
    ready = {(r.replica_id,): 1 for r in replicas if r.state is ReplicaState.READY}
    true: dict[str, Mapping[Any, float]] = {
        "queue_depth": waiting,
        "slots_busy": busy,
        "replica_ready": ready,
        "streams_open": {(): stage.orchestrator.streams_open},
        "tasks_enqueued_total": {(pool,): count for pool, count in checker.tally.admitted.items()},
        "tasks_started_total": {(pool,): count for pool, count in checker.tally.started.items()},
        "tasks_finished_total": checker.tally.ended,
    }
    for name, values in true.items():
        shown = {key: value for key, value in said[name].items() if value}
        wanted = {key: value for key, value in values.items() if value}
        if shown != wanted:
            yield f"{name} says {shown}, but the state is {wanted}"
