"""The real service behind one socket, a fresh one for each interaction.

Nothing in the service knows of it: an installation is settings, an engine and a device, put together as `serve` does;
whatever else a provider state needs is done over the API, or to a worker (it hangs, it dies).
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any, Literal, TypeVar

import httpx
import msgspec
from starlette.types import Receive, Scope, Send

from llama_orch.api.app import build_app
from llama_orch.clock import SystemClock
from llama_orch.contract.config import OpenaiServerSettings, OutboundSettings, Settings
from llama_orch.devices.inventory import discover
from llama_orch.engines.llamacpp import LlamaCppEngine
from llama_orch.engines.remote.engine import RemoteEngine
from llama_orch.engines.simulated import ServiceModel, SimulatedEngine, SimulatedWorker
from llama_orch.models.digest import Digests
from llama_orch.outbound.door import Outbound
from llama_orch.outbound.plugins import OutboundRequest, Plugins, Rewrite, hookimpl
from llama_orch.policy.rules import Rules
from llama_orch.runtime.fetches import Fetches
from llama_orch.runtime.hashing import examine_with
from llama_orch.runtime.library import FileLibrary, RemoteLibrary
from llama_orch.runtime.orchestrator import Orchestrator
from llama_orch.runtime.plan import make_plan
from llama_orch.runtime.wiring import wire
from llama_orch.stores.artifacts import ArtifactStore
from llama_orch.stores.database import Database
from tests.api.harness import serving_app
from tests.engines.remote.upstream import MODEL as REMOTE_MODEL
from tests.engines.remote.upstream import upstream_beside
from tests.hub import a_hub
from tests.live.client import until
from tests.live.elsewhere import elsewhere
from tests.live.models import ref
from tests.pact.exchange import TOKEN
from tests.tool_models import a_tool_model

T = TypeVar("T")

LIMIT_S = 60.0  # for anything that a state waits for
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Installation:
    """One pool, `default`, with `builtin:tiny` and one slot, on one device; or with a model of the server `upstream`,
    on engine openai. `load_s` and `load_error` are of the simulated engine."""

    engine: Literal["simulated", "llamacpp", "openai"] = "simulated"
    ctx: int = 2048
    capacity: int = 64
    full_policy: Literal["reject", "drop-lru"] = "reject"
    load_s: float = 0.0
    load_error: str | None = None
    budget_tokens: int | None = None  # of a session
    max_turns: int = 8
    knows_tools: bool = False  # its model is the built-in one with another template, as `default`
    reaches: str | None = None  # the URL of a machine that it may call, and calls for any URL of files.example
    hub: str | None = None  # the URL of a hub, which tasks have their models fetched from
    is_hub_open: bool = True  # to the outbound policy
    upstream: str | None = None  # the base URL of a server elsewhere

    @property
    def servers(self) -> list[OpenaiServerSettings]:
        url = self.upstream
        return [] if url is None else [OpenaiServerSettings(name="box", base_url=url, max_concurrency=1)]

    def settings(self, folder: Path) -> Settings:
        """Checked like a configuration file. `folder`: for files of models."""
        queue = {"capacity": self.capacity, "full_policy": self.full_policy}
        pool: dict[str, Any] = {"engine": self.engine, "slots": 1, "ctx": self.ctx, "queue": queue}
        if self.knows_tools:
            pool["model"] = ref(a_tool_model(folder / "tools.gguf"))
        if self.upstream is not None:
            pool = {"engine": self.engine, "model": f"openai:box/{REMOTE_MODEL}", "queue": queue}
        simulated = {"id": "gpu0", "backend": "simulated", "vram_bytes": 24 * GIB}
        device = simulated if self.engine == "simulated" else {"id": "cpu", "backend": "cpu"}
        budgets = {"mode": "off" if self.budget_tokens is None else "enforce", "tokens": self.budget_tokens}
        sessions = {"max_turns": self.max_turns, "budgets": budgets}
        policy = {"outbound": {"allow": [] if self.reaches is None else [self.reaches.removeprefix("http://")]}}
        on_demand = {"fetch": self.hub is not None}
        parts: dict[str, Any] = {"devices": [device], "pools": [pool], "sessions": sessions, "policy": policy}
        parts["on_demand"] = on_demand
        return msgspec.convert(parts, Settings)

    @property
    def plugins(self) -> Plugins:
        plugins = Plugins()
        if self.reaches is not None:
            plugins.register(_Mirror(self.reaches), "mirror")
        return plugins

    def build_engine(self) -> SimulatedEngine | LlamaCppEngine | RemoteEngine:
        if self.engine == "openai":
            return RemoteEngine(self.servers)
        if self.engine == "llamacpp":
            return LlamaCppEngine()
        model = ServiceModel(load_s=self.load_s, prefill_s_per_token=0.0, decode_s_per_token=0.002)
        return SimulatedEngine(model, self.load_error)


class _Mirror:
    """A plugin: so a pact can name a URL though nobody knows the port beforehand."""

    def __init__(self, url: str) -> None:
        self._url = url

    @hookimpl
    def llama_orch_outbound(self, request: OutboundRequest) -> Rewrite | None:
        there = request.url.replace("http://files.example", self._url, 1)
        return Rewrite(there, "the mirror") if request.host == "files.example" else None


@dataclass
class _Service:
    """One installation at work."""

    installation: Installation
    engine: SimulatedEngine | LlamaCppEngine | RemoteEngine
    orchestrator: Orchestrator
    artifacts: ArtifactStore
    app: Any
    running: asyncio.Task[None]


class Stage:
    """What provider states act on. Its methods are called from the verifier's threads; the services live in the
    server's."""

    def __init__(self, folder: Path, there: str, hub: str, upstream: str) -> None:
        self._folder = folder
        self.hub = hub  # a machine that has models, and keeps them back
        self.there = there  # another machine
        self.upstream = upstream  # a server of OpenAI's API
        self._digests = Digests(folder / "digests.json")
        self._is_up = Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._service: _Service | None = None
        self.http = httpx.Client(headers={"Authorization": f"Bearer {TOKEN}"}, timeout=LIMIT_S, trust_env=False)

    # -- for states --------------------------------------------------------------------------------------------------

    def raise_service(self, installation: Installation) -> None:
        """See that this installation is at work, and its pool ready if it can be. One that is up already stays, so that
        one interaction may have several states."""
        if self._service is None:
            self._do(self._start(installation))
            if installation.load_s == 0 and installation.load_error is None:
                self.wait_until(lambda: self.read("/v1/pools/default")["ready"])
        elif self._service.installation != installation:
            raise ValueError(f"{installation} cannot be had beside {self._service.installation}")

    def clear(self) -> None:
        """End the service and everything in it."""
        self._do(self._end())

    def submit(self, **fields: object) -> str:
        """A task with these fields of a TaskRequest; a short story where they do not say otherwise. Returns its ID."""
        story: dict[str, object] = {"model_ref": "builtin:tiny"}
        if fields.get("workload", "completion") == "completion":
            story["max_tokens"] = 8
        if not fields.keys() & {"prompt", "inputs", "messages"}:
            story["prompt"] = "Once upon a time"
        answer = self.http.post("/v1/tasks", json=story | fields)
        if answer.status_code != 202:
            raise ValueError(f"the task was refused: {answer.text}")
        return str(answer.json()["task_id"])

    def wait_until(self, condition: Callable[[], bool]) -> None:
        until(condition, LIMIT_S)

    def read(self, path: str) -> Any:
        return self.http.get(path).raise_for_status().json()

    def cancel(self, task_id: str) -> None:
        self.http.post(f"/v1/tasks/{task_id}/cancel").raise_for_status()

    def wait_for_the_end(self, task_id: str) -> None:
        """A stream ends with its task."""
        self.http.get(f"/v1/tasks/{task_id}/stream").raise_for_status()

    def act_on_worker(self, act: Callable[[SimulatedWorker], None]) -> None:
        """Do something to the pool's simulated worker."""
        self._do(self._act(act))

    def post(self, path: str, body: dict[str, object] | None = None) -> None:
        self.http.post(path, json=body).raise_for_status()

    def load_slowly(self, seconds: float) -> None:
        """From now on a model takes this long to load."""
        engine = self._at_work().engine
        assert isinstance(engine, SimulatedEngine)
        assert isinstance(engine.service, ServiceModel)
        engine.service = replace(engine.service, load_s=seconds)

    def drain(self) -> None:
        """What the end of the program begins with."""
        self._do(self._at_work().orchestrator.drain())

    # -- in the server's loop ----------------------------------------------------------------------------------------

    def _do(self, act: Coroutine[Any, Any, T]) -> T:
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(act, self._loop).result(LIMIT_S)

    def _at_work(self) -> _Service:
        assert self._service is not None
        return self._service

    async def _start(self, installation: Installation) -> None:
        clock, home = SystemClock(), Path(tempfile.mkdtemp(dir=self._folder))
        settings, engine = installation.settings(home), installation.build_engine()
        engines, sources = {installation.engine: engine}, discover(settings.devices, lambda uuids: False)
        plan = make_plan(settings, engines, sources, RemoteLibrary(installation.servers, FileLibrary()))
        artifacts = ArtifactStore(Database(home / "state.sqlite3"), home / "artifacts", clock.wall)
        orchestrator, service = wire(
            settings, engines, plan, self._digest, clock, artifacts=artifacts, plugins=installation.plugins
        )
        if installation.hub is not None:
            rules = Rules.of(OutboundSettings(allow_private_addresses=installation.is_hub_open))
            outbound, env = Outbound(rules, lambda _: None), {"HF_ENDPOINT": installation.hub}
            catalog, examine = orchestrator.catalog, examine_with(self._digest)
            catalog.fetches = Fetches(home / "models", outbound, examine, catalog, clock.wall, env)
        app = build_app(service, token=TOKEN, settings=settings)
        running = asyncio.create_task(orchestrator.run())
        self._service = _Service(installation, engine, orchestrator, artifacts, app, running)

    async def _digest(self, path: Path) -> str:
        return await asyncio.to_thread(self._digests.of, path)

    async def _end(self) -> None:
        service, self._service = self._service, None
        if service is not None:
            service.running.cancel()
            await asyncio.wait((service.running,))
            service.artifacts.database.close()

    async def _act(self, act: Callable[[SimulatedWorker], None]) -> None:
        engine = self._at_work().engine
        assert isinstance(engine, SimulatedEngine)
        act(engine.workers["default-0"])

    # -- the socket --------------------------------------------------------------------------------------------------

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        else:
            await self._at_work().app(scope, receive, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        self._loop = asyncio.get_running_loop()
        self._is_up.set()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self._end()
        await send({"type": "lifespan.shutdown.complete"})

    def wait_until_up(self, port: int) -> None:
        if not self._is_up.wait(LIMIT_S):
            raise RuntimeError("the server did not come up")
        self.http.base_url = httpx.URL(f"http://127.0.0.1:{port}")


@contextmanager
def a_stage() -> Iterator[Stage]:
    """The socket, with nothing behind it yet; `http.base_url` of the stage is its address."""
    with (
        tempfile.TemporaryDirectory(prefix="llorch-pact-") as folder,
        elsewhere() as (there, _),
        a_hub(b"GGUF" * 1000, hold_after=1000) as hub,
        upstream_beside() as upstream,
    ):
        stage = Stage(Path(folder), there, hub.url, upstream.url)
        with serving_app(stage) as port, stage.http:
            stage.wait_until_up(port)
            yield stage
