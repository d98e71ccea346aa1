"""Pools: list, read, health, drain, reload."""

from __future__ import annotations

from llama_orch.api.service import Service
from llama_orch.contract.models import DrainRequest, Pool, PoolHealth, PoolList, ReloadRequest


class Pools:
    _service: Service

    async def list_pools(self, *, limit: int, cursor: str | None) -> PoolList:
        return self._service.list_pools(limit=limit, cursor=cursor)

    async def get_pool(self, *, id: str) -> Pool:
        return self._service.get_pool(id)

    async def get_pool_health(self, *, id: str) -> PoolHealth:
        return self._service.get_pool_health(id)

    async def drain_pool(self, *, id: str, body: DrainRequest) -> PoolHealth:
        return await self._service.drain_pool(id, body.deadline_ms)

    async def reload_pool(self, *, id: str, body: ReloadRequest) -> PoolHealth:
        return await self._service.reload_pool(id, body.new_model_ref)
