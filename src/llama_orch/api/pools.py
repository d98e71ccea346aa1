"""Pools: list, read, health."""

from __future__ import annotations

from llama_orch.api.service import Service
from llama_orch.contract.models import Pool, PoolHealth, PoolList


class Pools:
    _service: Service

    async def list_pools(self, *, limit: int, cursor: str | None) -> PoolList:
        return self._service.list_pools(limit=limit, cursor=cursor)

    async def get_pool(self, *, id: str) -> Pool:
        return self._service.get_pool(id)

    async def get_pool_health(self, *, id: str) -> PoolHealth:
        return self._service.get_pool_health(id)
