"""Sessions: read, end."""

from __future__ import annotations

from llama_orch.api.service import Service
from llama_orch.contract.models import SessionInfo


class Sessions:
    _service: Service

    async def get_session(self, *, id: str) -> SessionInfo:
        return self._service.get_session(id.lower())

    async def delete_session(self, *, id: str) -> None:
        await self._service.delete_session(id.lower())
