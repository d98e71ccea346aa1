"""Requests to elsewhere: what the policy says, and the tool fetch."""

from __future__ import annotations

from llama_orch.api.service import Service
from llama_orch.contract.models import FetchRequest, FetchResult, OutboundCheck, PolicyDecision


class Outbound:
    _service: Service

    async def check_outbound(self, *, body: OutboundCheck) -> PolicyDecision:
        return await self._service.check_outbound(body.url)

    async def fetch_url(self, *, body: FetchRequest) -> FetchResult:
        return await self._service.fetch_url(body)
