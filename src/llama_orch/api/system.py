"""The installation as a whole: capabilities, metrics, and whether it is there."""

from __future__ import annotations

from starlette.responses import Response

from llama_orch.api.service import Service
from llama_orch.contract.models import Capabilities, Healthz

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class System:
    _service: Service

    async def get_capabilities(self) -> Capabilities:
        return self._service.capabilities()

    async def get_metrics(self) -> Response:
        return Response(self._service.metrics_text(), headers={"content-type": METRICS_TYPE})

    async def get_healthz(self) -> Healthz:
        return Healthz(status="ok")
