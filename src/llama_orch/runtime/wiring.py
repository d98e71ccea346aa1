"""The service's parts put together, for the server and for rehearsals alike; what differs between them is passed in."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from llama_orch.clock import Clock
from llama_orch.contract.config import Settings
from llama_orch.core.scheduler import Scheduler
from llama_orch.engines.base import Engine
from llama_orch.engines.remote.engine import RemoteEngine
from llama_orch.models.catalog import CatalogBook, Sight
from llama_orch.models.references import ModelNotFound
from llama_orch.observe.catalog import CatalogJournal
from llama_orch.observe.journal import Journal
from llama_orch.observe.metrics import Metrics
from llama_orch.observe.outbound import OutboundJournal
from llama_orch.outbound.door import Outbound
from llama_orch.outbound.plugins import Plugins
from llama_orch.policy.rules import Rules
from llama_orch.runtime.archive import Archive
from llama_orch.runtime.catalog import Catalog, Glance
from llama_orch.runtime.fetches import Fetches
from llama_orch.runtime.fetching import Fetching
from llama_orch.runtime.hashing import Examine, examine_with
from llama_orch.runtime.library import CatalogLibrary, Model
from llama_orch.runtime.on_demand import Look
from llama_orch.runtime.orchestrator import Orchestrator
from llama_orch.runtime.plan import Plan
from llama_orch.runtime.records import Records, Unkept
from llama_orch.runtime.replicas import Replicas
from llama_orch.runtime.service import LocalService, gauges
from llama_orch.runtime.sight import sight_of
from llama_orch.stores.artifacts import ArtifactStore


@dataclass(frozen=True, slots=True)
class Keeping:
    """What the catalog of a service that keeps things is made of. The plan's library knows the same book."""

    book: CatalogBook
    records: Records
    glance: Glance
    examine: Examine
    is_known: bool
    is_alone: bool = False
    fetched: Path | None = None  # the folder of files from elsewhere; None: none are kept


def wire(
    settings: Settings,
    engines: Mapping[str, Engine],
    plan: Plan,
    digest: Callable[[Path], Awaitable[str]],
    clock: Clock,
    look: Look | None = None,
    keeping: Keeping | None = None,
    artifacts: ArtifactStore | None = None,
    plugins: Plugins | None = None,
) -> tuple[Orchestrator, LocalService]:
    """The orchestrator and what the edge sees of it. `digest` gives a model file's `sha256:…`; `look` finds a model
    without holding up the event loop (the plan's own library, where that does no harm); `keeping` is for a catalog that
    outlives the service. Without `artifacts` none are kept. `plugins` judge outbound requests."""
    if keeping is None:
        keeping = _keeping_nothing(settings, plan, digest)

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
    for engine in engines.values():
        if isinstance(engine, RemoteEngine):
            engine.door = outbound
    replicas = Replicas(plan.replicas, digest)
    catalog = Catalog(
        keeping.book,
        keeping.records,
        keeping.glance,
        keeping.examine,
        settings,
        clock.wall,
        CatalogJournal(metrics),
        is_known=keeping.is_known,
        is_alone=keeping.is_alone,
    )
    if keeping.fetched is not None:
        catalog.fetches = Fetches(keeping.fetched, outbound, keeping.examine, catalog, clock.wall)
    archive = Archive(artifacts, keeps_transcripts=settings.tasks.keep_transcripts)
    orchestrator = Orchestrator(
        scheduler, replicas, plan.builder, look or look_here, Journal(metrics), clock, settings, catalog, archive
    )
    return orchestrator, LocalService(orchestrator, engines, sources, metrics, settings, Fetching(outbound))


def _keeping_nothing(settings: Settings, plan: Plan, digest: Callable[[Path], Awaitable[str]]) -> Keeping:
    """For rehearsals, and tests of other things: nothing outlives the service, no process and no thread is made."""
    book, beneath = CatalogBook(), plan.builder.library
    plan.builder.library = CatalogLibrary(book, beneath)

    async def glance(reference: str) -> tuple[Sight, Path]:
        path = beneath.look(reference).path
        if path is None:
            raise ModelNotFound(f"{reference!r} is no file of this machine")
        return sight_of(path, settings), path

    return Keeping(book, Unkept(), glance, examine_with(digest), is_known=True)
