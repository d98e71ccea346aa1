"""The catalog as the edge sees it: entries in the contract's words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llama_orch.clock import timestamp
from llama_orch.contract.models import (
    CatalogModel,
    CatalogModelList,
    CatalogModelRequest,
    ModelFetch,
    ModelStateRequest,
    ModelVerification,
    TrustPolicy,
    VerificationOutcome,
    VerificationState,
)
from llama_orch.errors import InvalidParams, NotFound
from llama_orch.models.catalog import Entry
from llama_orch.runtime.fetches import FetchReader, at_rest

if TYPE_CHECKING:
    from llama_orch.runtime.orchestrator import Orchestrator


class CatalogService:
    """Reads and acts for one HTTP call at a time."""

    def __init__(self, orchestrator: Orchestrator) -> None:
        self._orchestrator = orchestrator
        self._catalog = orchestrator.catalog

    async def create(self, request: CatalogModelRequest) -> tuple[CatalogModel, bool]:
        entry, is_new = await self._catalog.create(request)
        return self._view(entry), is_new

    async def list(self, *, limit: int, cursor: str | None) -> CatalogModelList:
        start = 0 if cursor is None else _number(cursor)
        found = [entry for entry in await self._catalog.entries() if entry.number > start]
        more = str(found[limit - 1].number) if len(found) > limit else None
        return CatalogModelList(items=[self._view(entry) for entry in found[:limit]], next_cursor=more)

    async def get(self, model_id: str) -> CatalogModel:
        return self._view(await self._catalog.get(model_id))

    async def delete(self, model_id: str) -> None:
        await self._orchestrator.delete_model(model_id)

    async def verify(self, model_id: str) -> ModelVerification:
        return self._verification(await self._catalog.verify(model_id))

    async def fetch(self, model_id: str) -> ModelFetch:
        return self._fetch(await self._catalog.fetch(model_id))

    def open_fetch(self, model_id: str) -> FetchReader:
        entry, fetches = self._catalog.book.get(model_id), self._catalog.fetches
        if entry is None:
            raise NotFound(f"the catalog has no model {model_id!r}")
        on_close = self._orchestrator.count_stream()
        under_way = None if fetches is None else fetches.of(entry)
        return FetchReader(lambda: self._fetch(entry) if under_way is None else under_way.view(), under_way, on_close)

    def _fetch(self, entry: Entry) -> ModelFetch:
        return at_rest(entry) if self._catalog.fetches is None else self._catalog.fetches.view(entry)

    async def put_in_state(self, model_id: str, request: ModelStateRequest) -> CatalogModel:
        return self._view(await self._orchestrator.put_model_in_state(model_id, request.state, request.deadline_ms))

    def _view(self, entry: Entry) -> CatalogModel:
        declared, policy, sight = entry.declared, self._catalog.policy, entry.sight
        return CatalogModel(
            id=entry.id,
            digest=entry.digest,
            source_url=entry.source,
            tags=declared.tags,
            manifests=declared.manifests,
            signatures=declared.signatures,
            sbom=declared.sbom,
            trust_policy=TrustPolicy(
                mode=policy.mode,
                allowed_registries=policy.allowed_registries,
                require_signature=policy.require_signature,
                require_sbom=policy.require_sbom,
            ),
            state=entry.state,
            size_bytes=None if sight is None else sight.size_bytes,
            verification=self._verification(entry),
            gguf=None if sight is None else sight.gguf,
            fetch=self._fetch(entry) if entry.is_fetched else None,
            created_at=timestamp(entry.created_s),
        )

    def _verification(self, entry: Entry) -> ModelVerification:
        """Once a new one is under way, the last one says nothing any more."""
        under_way, finding = self._catalog.under_way(entry), entry.finding
        if under_way is not None:
            state = VerificationState.RUNNING if under_way.is_running else VerificationState.QUEUED
            return _verification(state, read_bytes=under_way.read_bytes, total_bytes=under_way.total_bytes)
        if entry.is_due:  # taken up in a moment: the service has just begun
            return _verification(VerificationState.QUEUED)
        judgement = self._catalog.judgement(entry)
        if finding is None or judgement is None:
            return _verification(VerificationState.UNVERIFIED)
        return ModelVerification(
            state=VerificationState.DONE,
            outcome=VerificationOutcome.FAILED if judgement.problems else VerificationOutcome.PASSED,
            digest=finding.digest,
            warnings=judgement.warnings,
            problems=judgement.problems,
            read_bytes=None,
            total_bytes=None,
            verified_at=timestamp(finding.at_s),
        )


def _verification(
    state: VerificationState, *, read_bytes: int | None = None, total_bytes: int | None = None
) -> ModelVerification:
    """One without an outcome."""
    return ModelVerification(
        state=state,
        outcome=None,
        digest=None,
        warnings=[],
        problems=[],
        read_bytes=read_bytes,
        total_bytes=total_bytes,
        verified_at=None,
    )


def _number(cursor: str) -> int:
    if not (cursor.isascii() and cursor.isdigit() and len(cursor) <= 18):
        raise InvalidParams("`cursor` is not one that this service gave out; start again without it")
    return int(cursor)
