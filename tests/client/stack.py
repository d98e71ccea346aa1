"""The whole service behind the whole of HTTP, in virtual time, with the client in front of it."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from llama_orch.api.app import build_app
from llama_orch.client import AsyncClient
from llama_orch.contract.config import Settings
from llama_orch.contract.models import Determinism, TaskRequest
from llama_orch.engines.simulated import ServiceModel, SimulatedEngine
from llama_orch.testing.rehearsal import Stage, a_rehearsal
from llama_orch.testing.transport import AppTransport, Cut, never

TOKEN = "t" * 32
URL = "http://127.0.0.1:8080"


@dataclass(frozen=True, slots=True)
class Stack:
    """A running service, what was asked of it, and a patient client."""

    stage: Stage
    transport: AppTransport
    client: AsyncClient


@asynccontextmanager
async def a_stack(
    settings: Settings,
    model: ServiceModel | None = None,
    *,
    cut: Cut = never,
    dice: random.Random | None = None,
    is_loaded: bool = True,
    engine: SimulatedEngine | None = None,
    **limits: Any,
) -> AsyncIterator[Stack]:
    """`limits` are the client's; without them it never gives up."""
    async with a_rehearsal(settings, model=model, is_loaded=is_loaded, engine=engine) as stage:
        app = build_app(stage.service, token=TOKEN, settings=settings, validate_responses=True)
        transport = AppTransport(app, cut=cut)
        limits = {"attempts_max": 10_000, "wait_max_s": 1e9} | limits
        spread = (dice or random.Random(0)).random
        async with AsyncClient(URL, TOKEN, transport=transport, dice=spread, **limits) as client:
            yield Stack(stage, transport, client)


def a_request(number: int = 0, **fields: Any) -> TaskRequest:
    """Its id and its seed follow from the number, so that a run can be repeated."""
    given = {"prompt": f"task {number}", "determinism": Determinism.BEST_EFFORT, "seed": number, **fields}
    return TaskRequest(task_id=f"{number:08x}-0000-4000-8000-000000000000", model_ref="builtin:tiny", **given)
