"""The service's parts put together, for the server and for rehearsals alike; what differs between them is passed in."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

from llama_orch.clock import Clock
from llama_orch.contract.config import Settings
from llama_orch.core.scheduler import Scheduler
from llama_orch.devices.inventory import Source
from llama_orch.engines.base import Engine
from llama_orch.observe.journal import Journal
from llama_orch.observe.metrics import Metrics
from llama_orch.runtime.orchestrator import Orchestrator
from llama_orch.runtime.plan import Plan
from llama_orch.runtime.replicas import Replicas
from llama_orch.runtime.service import LocalService, gauges


def wire(
    settings: Settings,
    engines: Mapping[str, Engine],
    sources: Sequence[Source],
    plan: Plan,
    digest: Callable[[Path], Awaitable[str]],
    clock: Clock,
) -> tuple[Orchestrator, LocalService]:
    """The orchestrator and what the edge sees of it. `digest` gives a model file's `sha256:…`."""
    scheduler = Scheduler(plan.pools, plan.devices, retain_s=settings.tasks.retain_ms / 1000)
    metrics = Metrics(lambda: gauges(orchestrator))
    replicas = Replicas(plan.replicas, digest)
    orchestrator = Orchestrator(scheduler, replicas, Journal(metrics), clock, settings, sources)
    return orchestrator, LocalService(orchestrator, engines, sources, metrics, settings)
