"""Puts the edge together, from the outside in: Edge, Documents, then Connexion's routing and security, our check of the
request, and the handler."""

from __future__ import annotations

import re

from connexion.middleware.lifespan import LifespanMiddleware
from connexion.middleware.security import SecurityMiddleware
from connexion.resolver import Resolver
from starlette.types import ASGIApp

from llama_orch.api.artifacts import Artifacts
from llama_orch.api.auth import security_map
from llama_orch.api.bodies import Bodies
from llama_orch.api.catalog import Catalog
from llama_orch.api.documents import Documents, merged_document
from llama_orch.api.edge import Edge
from llama_orch.api.lean_connexion import checked_before
from llama_orch.api.openai import OpenAi
from llama_orch.api.openai_run import Waiters
from llama_orch.api.outbound import Outbound
from llama_orch.api.pools import Pools
from llama_orch.api.service import Service
from llama_orch.api.sessions import Sessions
from llama_orch.api.system import System
from llama_orch.api.tasks import Tasks
from llama_orch.api.validation import DirectApp, RequestCheck, ResponseCheck, StrictRouting
from llama_orch.clock import SystemClock
from llama_orch.contract.config import Settings
from llama_orch.contract.operations import Handlers


class Api(Tasks, Sessions, Catalog, Pools, Artifacts, Outbound, System, OpenAi):
    """One method per operation of the contract."""

    def __init__(self, service: Service, max_streams: int) -> None:
        self._service = service
        self._waiters = Waiters(max_streams)
        self._answers = Bodies(0, "the artifacts that are being read")
        self._clock = SystemClock()
        self._started_at = int(self._clock.wall())


def handler_name(operation_id: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", operation_id).lower()


def build_app(service: Service, *, token: str, settings: Settings, validate_responses: bool = False) -> ASGIApp:
    """`validate_responses` is for tests: an answer that the contract does not allow becomes a 500."""
    handlers: Handlers = Api(service, settings.server.max_streams)
    response_check = [ResponseCheck] if validate_responses else []
    app = DirectApp(
        "llama_orch",
        middlewares=[StrictRouting, SecurityMiddleware, RequestCheck, *response_check, LifespanMiddleware],
    )
    with checked_before():
        app.add_api(
            merged_document(metrics_are_open=not settings.metrics.require_token),
            resolver=Resolver(lambda operation_id: getattr(handlers, handler_name(operation_id))),
            security_map=security_map(token),
            validate_responses=validate_responses,
        )
    return Edge(Documents(app), settings.server)
