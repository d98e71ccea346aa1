"""A catalog in memory, with behaviour: what is entered is there, what is served cannot be deleted, a verification is
over at once. It misbehaves where a name asks for it."""

from __future__ import annotations

import msgspec
from msgspec import structs

from llama_orch.contract.models import (
    CatalogModel,
    CatalogModelList,
    CatalogModelRequest,
    FetchState,
    GgufInfo,
    ModelFetch,
    ModelState,
    ModelStateRequest,
    ModelVerification,
    TrustPolicy,
    VerificationOutcome,
    VerificationState,
)
from llama_orch.errors import Conflict, NotFound, PolicyDenied, StorageUnavailable

SERVED_MODEL = "served"  # a pool has it
FULL_DISK_MODEL = "full-disk"  # cannot be entered
KNOWN_MODEL = "known"  # is there from the beginning
CLOSED_SOURCE = "file:/etc/passwd"
DIGEST = "sha256:" + "a" * 64


FETCHED = ModelFetch(state=FetchState.DONE, received_bytes=7, total_bytes=7, error=None)


class FakeFetchReader:
    """One event."""

    def __init__(self) -> None:
        self._events = [b"id: 0\nevent: progress\ndata: %b\n\n" % msgspec.json.encode(FETCHED)]

    async def batch(self) -> bytes | None:
        return self._events.pop() if self._events else None

    def close(self) -> None:
        self._events.clear()


class FakeCatalog:
    def __init__(self) -> None:
        self.models: dict[str, CatalogModel] = {}
        self.requests: dict[str, CatalogModelRequest] = {}
        self.deadlines_ms: list[int | None] = []
        self.restore()

    def restore(self) -> None:
        """What was there at the beginning, and nothing else."""
        self.models.clear()
        self.requests.clear()
        request = CatalogModelRequest(id=KNOWN_MODEL, source_url="builtin:tiny")
        self.models[request.id], self.requests[request.id] = a_model(request), request

    async def create(self, request: CatalogModelRequest) -> tuple[CatalogModel, bool]:
        if request.id in self.models:
            if self.requests[request.id] != request:
                raise Conflict("another model has the id")
            return self.models[request.id], False
        if request.source_url == CLOSED_SOURCE:
            raise PolicyDenied("that is not open")
        if request.id == FULL_DISK_MODEL:
            raise StorageUnavailable("the store is full")
        self.requests[request.id] = request
        self.models[request.id] = a_model(request)
        return self.models[request.id], True

    async def list(self, *, limit: int, cursor: str | None) -> CatalogModelList:
        start = 0 if cursor is None else int(cursor)
        items = list(self.models.values())[start : start + limit]
        more = str(start + limit) if len(self.models) > start + limit else None
        return CatalogModelList(items=items, next_cursor=more)

    async def get(self, model_id: str) -> CatalogModel:
        if model_id not in self.models:
            raise NotFound("no such model")
        return self.models[model_id]

    async def delete(self, model_id: str) -> None:
        await self.get(model_id)
        if model_id == SERVED_MODEL:
            raise Conflict("a pool serves it")
        del self.models[model_id], self.requests[model_id]

    async def verify(self, model_id: str) -> ModelVerification:
        model = await self.get(model_id)
        is_wrong = model.digest not in (None, DIGEST)
        done = structs.replace(
            model.verification,
            state=VerificationState.DONE,
            outcome=VerificationOutcome.FAILED if is_wrong else VerificationOutcome.PASSED,
            digest=DIGEST,
            warnings=["no signature was declared"],
            problems=["the digest is another one"] if is_wrong else [],
            verified_at="2026-01-01T12:00:01.000Z",
        )
        self.models[model_id] = structs.replace(model, verification=done)
        return structs.replace(UNVERIFIED, state=VerificationState.QUEUED, read_bytes=0, total_bytes=7)

    async def fetch(self, model_id: str) -> ModelFetch:
        await self.get(model_id)
        return FETCHED

    def open_fetch(self, model_id: str) -> FakeFetchReader:
        if model_id not in self.models:
            raise NotFound("no such model")
        return FakeFetchReader()

    async def put_in_state(self, model_id: str, request: ModelStateRequest) -> CatalogModel:
        self.models[model_id] = structs.replace(await self.get(model_id), state=request.state)
        self.deadlines_ms.append(request.deadline_ms)
        return self.models[model_id]


UNVERIFIED = ModelVerification(
    state=VerificationState.UNVERIFIED,
    outcome=None,
    digest=None,
    warnings=[],
    problems=[],
    read_bytes=None,
    total_bytes=None,
    verified_at=None,
)


def a_model(request: CatalogModelRequest) -> CatalogModel:
    return CatalogModel(
        id=request.id,
        digest=request.digest,
        source_url=request.source_url,
        tags=request.tags,
        manifests=request.manifests,
        signatures=request.signatures,
        sbom=request.sbom,
        trust_policy=TrustPolicy(mode="permissive", allowed_registries=[], require_signature=False, require_sbom=False),
        state=ModelState.ACTIVE,
        size_bytes=7,
        verification=UNVERIFIED,
        gguf=GgufInfo(architecture="llama", context_length=2048, quantisation="F32", vram_bytes=512 << 20),
        fetch=None,
        created_at="2026-01-01T12:00:00.000Z",
    )
