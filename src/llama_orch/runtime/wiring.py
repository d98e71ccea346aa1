"""The service's parts put together, for the server and for rehearsals alike; what differs between them is passed in."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from llama_orch.clock import Clock
from llama_orch.contract.config import Settings
from llama_orch.core.scheduler import Scheduler
from llama_orch.engines.base import Engine
from llama_orch.observe.journal import Journal
from llama_orch.observe.metrics import Metrics
from llama_orch.observe.outbound import OutboundJournal
from llama_orch.outbound.door import Outbound
from llama_orch.outbound.plugins import Plugins
from llama_orch.policy.rules import Rules
from llama_orch.runtime.archive import Archive
from llama_orch.runtime.fetching import Fetching
from llama_orch.runtime.library import Model
from llama_orch.runtime.on_demand import Look
from llama_orch.runtime.orchestrator import Orchestrator
from llama_orch.runtime.plan import Plan
from llama_orch.runtime.replicas import Replicas
from llama_orch.runtime.service import LocalService, gauges
from llama_orch.stores.artifacts import ArtifactStore


def wire(
    settings: Settings,
    engines: Mapping[str, Engine],
    plan: Plan,
    digest: Callable[[Path], Awaitable[str]],
    clock: Clock,
    look: Look | None = None,
    artifacts: ArtifactStore | None = None,
    plugins: Plugins | None = None,
) -> tuple[Orchestrator, LocalService]:
    """The orchestrator and what the edge sees of it. `digest` gives a model file's `sha256:…`; `look` finds a model
    without holding up the event loop (the plan's own library, where that does no harm). Without `artifacts` none are
    kept. `plugins` judge outbound requests."""

    async def look_here(reference: str) -> Model:
        return plan.builder.library.look(reference)

    scheduler = Scheduler(
        plan.pools,
        plan.devices,
        retain_s=settings.tasks.retain_ms / 1000,
        min_residency_s=settings.on_demand.min_residency_ms / 1000,
        sessions=settings.sessions,
    )
    sources = list(plan.builder.sources.values())
    metrics = Metrics(lambda: gauges(orchestrator, sources))
    outbound = Outbound(Rules.of(settings.policy.outbound), OutboundJournal(metrics).decided, plugins=plugins)
    replicas = Replicas(plan.replicas, digest)
    archive = Archive(artifacts, keeps_transcripts=settings.tasks.keep_transcripts)
    orchestrator = Orchestrator(
        scheduler, replicas, plan.builder, look or look_here, Journal(metrics), clock, settings, archive
    )
    return orchestrator, LocalService(orchestrator, engines, sources, metrics, settings, Fetching(outbound))
