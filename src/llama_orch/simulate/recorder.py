"""What happened on the cards, and when: written down as the scheduler's events and effects pass by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from llama_orch.core.effects import Effect, Ended, Start, Unload
from llama_orch.engines.simulated import SimulatedWorker
from llama_orch.testing.stage import Stage


@dataclass(slots=True)
class Span:
    """Something that took a time on cards. `slots` is 0 for a load; `end_s` is None while it goes on."""

    kind: str  # task, load
    devices: tuple[str, ...]
    model: str
    who: str  # the task's agent; the replica of a load
    start_s: float
    end_s: float | None = None
    slots: int = 0
    tokens_out: int = 0


@dataclass(slots=True)
class Recorder:
    """Watches one stage from before its first event. `agents`: task id -> name of the agent."""

    now: Callable[[], float]
    agents: dict[str, str] = field(default_factory=dict)
    spans: list[Span] = field(default_factory=list)
    evictions: dict[str, int] = field(default_factory=dict)  # by device
    depth: list[tuple[float, int]] = field(default_factory=list)  # tasks that wait, whenever that changes
    _open: dict[str, Span] = field(default_factory=dict)  # by task id, or replica id of a load

    def watch(self, stage: Stage) -> None:
        scheduler = stage.scheduler
        take, ready, lost, unloaded = (
            scheduler.take_effects,
            scheduler.replica_ready,
            scheduler.replica_lost,
            scheduler.replica_unloaded,
        )

        def take_effects() -> list[Effect]:
            effects = take()
            for effect in effects:
                self._see(stage, effect)
            if effects:
                self._look_at_queues(stage)
            return effects

        def closing(event: Callable[..., None]) -> Callable[..., None]:
            def heard(replica_id: str, *args: Any, **kwargs: Any) -> None:
                self._close(replica_id)
                event(replica_id, *args, **kwargs)

            return heard

        scheduler.take_effects = take_effects  # type: ignore[method-assign]
        scheduler.replica_ready = closing(ready)  # type: ignore[method-assign]
        scheduler.replica_lost = closing(lost)  # type: ignore[method-assign]
        scheduler.replica_unloaded = closing(unloaded)  # type: ignore[method-assign]

    def launched(self, worker: SimulatedWorker, number: int) -> None:
        """To be called at each launch."""
        spec = worker.spec
        self._close(spec.replica_id)
        span = Span("load", spec.device_uuids, spec.file.name, spec.replica_id, self.now())
        self.spans.append(span)
        self._open[spec.replica_id] = span

    def _see(self, stage: Stage, effect: Effect) -> None:
        match effect:
            case Start(task_id):
                task = stage.scheduler.tasks[task_id]
                replica = stage.scheduler.replicas[task.replica_id or ""]
                model = task.pool.spec.model.partition(":")[2]
                slots = 0 if task.lease is None else len(task.lease.slots)
                who = self.agents.get(task_id, "")
                span = Span("task", replica.device_ids, model, who, self.now(), slots=slots)
                self.spans.append(span)
                self._open[task_id] = span
            case Ended(task_id):
                if task_id in self._open:
                    self._open[task_id].tokens_out = stage.scheduler.tasks[task_id].tokens_out
                self._close(task_id)
            case Unload(replica_id, "evicted"):
                for device_id in stage.scheduler.replicas[replica_id].device_ids:
                    self.evictions[device_id] = self.evictions.get(device_id, 0) + 1

    def _close(self, key: str) -> None:
        span = self._open.pop(key, None)
        if span is not None:
            span.end_s = self.now()

    def _look_at_queues(self, stage: Stage) -> None:
        depth = sum(len(pool.queue) for pool in stage.scheduler.fleet.every_pool())
        if not self.depth or self.depth[-1][1] != depth:
            self.depth.append((self.now(), depth))

    def finished(self) -> list[Span]:
        """Everything, what still goes on being cut off now."""
        for key in list(self._open):
            self._close(key)
        return self.spans


def busy_s(spans: list[Span], device_id: str, kind: str = "task") -> float:
    """How long the device had at least one span of the kind."""
    times = sorted((s.start_s, s.end_s or s.start_s) for s in spans if s.kind == kind and device_id in s.devices)
    total, until = 0.0, float("-inf")
    for start, end in times:
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total
