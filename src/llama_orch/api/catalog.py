"""The catalog: enter, list, read, delete, verify, retire."""

from __future__ import annotations

from http import HTTPStatus

from llama_orch.api.answer import Answer
from llama_orch.api.service import Service
from llama_orch.api.sse import EventStream
from llama_orch.contract.models import (
    CatalogModel,
    CatalogModelList,
    CatalogModelRequest,
    ModelFetch,
    ModelStateRequest,
    ModelVerification,
)


class Catalog:
    _service: Service

    async def create_catalog_model(self, *, body: CatalogModelRequest) -> Answer:
        model, is_new = await self._service.catalog.create(body)
        return Answer(model, {}, HTTPStatus.CREATED if is_new else HTTPStatus.OK)

    async def list_catalog_models(self, *, limit: int, cursor: str | None) -> CatalogModelList:
        return await self._service.catalog.list(limit=limit, cursor=cursor)

    async def get_catalog_model(self, *, id: str) -> CatalogModel:
        return await self._service.catalog.get(id)

    async def delete_catalog_model(self, *, id: str) -> None:
        await self._service.catalog.delete(id)

    async def verify_catalog_model(self, *, id: str) -> ModelVerification:
        return await self._service.catalog.verify(id)

    async def fetch_catalog_model(self, *, id: str) -> ModelFetch:
        return await self._service.catalog.fetch(id)

    async def stream_catalog_model_fetch(self, *, id: str) -> EventStream:
        return EventStream(lambda after: self._service.catalog.open_fetch(id))

    async def set_catalog_model_state(self, *, id: str, body: ModelStateRequest) -> CatalogModel:
        return await self._service.catalog.put_in_state(id, body)
