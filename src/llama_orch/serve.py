"""The composition root: the only place where concrete classes meet. Starts the service, ends it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path

import uvicorn
import uvloop

from llama_orch import home_lock
from llama_orch.api.app import build_app
from llama_orch.api.protocol import HttpProtocol
from llama_orch.clock import SystemClock
from llama_orch.contract.config import Settings
from llama_orch.devices.inventory import DeviceError, Source, discover
from llama_orch.engines.base import Engine
from llama_orch.engines.private_folder import sweep_private_folders
from llama_orch.engines.process import worker_environment
from llama_orch.engines.registry import build_engines
from llama_orch.errors import StorageUnavailable
from llama_orch.models.calibration import Calibration
from llama_orch.models.catalog import CatalogBook, Sight
from llama_orch.models.digest import Digests
from llama_orch.models.references import resolve
from llama_orch.observe import logs
from llama_orch.outbound.plugins import Plugins
from llama_orch.runtime.builder import Builder
from llama_orch.runtime.hashing import HashingProcess
from llama_orch.runtime.library import CatalogLibrary, FileLibrary, Model, RemoteLibrary
from llama_orch.runtime.plan import Plan, PlanError, plan_with
from llama_orch.runtime.sight import sight_of
from llama_orch.runtime.wiring import Keeping, wire
from llama_orch.settings import Home
from llama_orch.stores.artifacts import FOLDER_NAME as ARTIFACTS_NAME
from llama_orch.stores.artifacts import ArtifactStore
from llama_orch.stores.catalog import CatalogRecords, CatalogStore
from llama_orch.stores.database import FILE_NAME, Database

log = logging.getLogger("llama_orch.serve")

SHUTDOWN_LIMIT_S = 5  # for connections that are still open once every task has ended
PROBE_LIMIT_S = 30
FETCHED_NAME = "models"  # below the home folder: files from elsewhere
SPARE_DESCRIPTORS = 1024  # connections that do not stream, workers, files


def run_server(settings: Settings, home: Home, token: str, *, lifeline: bool) -> int:
    """Serve until told to end; returns the exit code.

    `lifeline` is for the server that a command starts for itself: it ends with the command, which is when standard
    input closes, and it works beside any other on the same home folder. So it does not hold that folder's lock, and may
    keep nothing there but caches that are replaced as a whole, and what goes through the stores, which several
    processes may use at once.
    """
    logs.set_up(settings.logs.level, settings.logs.format, [token])
    with contextlib.nullcontext() if lifeline else home_lock.hold(home):
        return _serve(settings, home, token, lifeline=lifeline)


def _serve(settings: Settings, home: Home, token: str, *, lifeline: bool) -> int:
    _allow_descriptors(settings)
    sweep_private_folders()  # what a service that was killed could not remove
    with contextlib.closing(Database(home.path / FILE_NAME)) as database:
        return _serve_with(database, settings, home, token, lifeline=lifeline)


def _serve_with(database: Database, settings: Settings, home: Home, token: str, *, lifeline: bool) -> int:
    try:
        plugins = Plugins.installed()
        engines = _engines(settings)
        sources = discover(settings.devices, lambda uuids: _can_use_cuda(settings, uuids))
        digests = Digests(home.path / "digests.json")
        keeping = _catalog(database, settings, digests, lifeline=lifeline)
        plan = plan_with(_builder(settings, engines, sources, home, digests, keeping.book), settings)
        listener = _bind(settings)
    except (PlanError, DeviceError, ValueError, OSError) as error:
        for problem in getattr(error, "problems", [str(error)]):
            print(f"error: {problem}", file=sys.stderr)
        return 1
    artifacts = ArtifactStore(database, home.path / ARTIFACTS_NAME, SystemClock().wall, [token])
    database.submit(artifacts.sweep).add_done_callback(_swept)
    with listener, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        program = _Program(settings, token, engines, plan, digests, keeping, artifacts, plugins)
        return runner.run(program.run(listener, lifeline=lifeline))


def _swept(sweep: Future[int]) -> None:
    """A disk that does not do is no reason not to serve; whoever needs it is told."""
    error = sweep.exception()
    if error is not None:
        log.warning("the store was not swept: %s", error)
    elif sweep.result():
        log.info("%d files that interrupted writes had left in the store were removed", sweep.result())


def _builder(
    settings: Settings,
    engines: Mapping[str, Engine],
    sources: Sequence[Source],
    home: Home,
    digests: Digests,
    book: CatalogBook,
) -> Builder:
    """Knows what earlier loads really took."""
    calibration = Calibration(home.path / "calibration.json")
    files = CatalogLibrary(book, FileLibrary(), home.path / FETCHED_NAME)
    library = RemoteLibrary(settings.engines.openai.servers, files)

    def digest_known(model: Model) -> str | None:
        return None if model.path is None else digests.known(model.path)

    return Builder(engines, sources, library, calibration, digest_known)


def _catalog(database: Database, settings: Settings, digests: Digests, *, lifeline: bool) -> Keeping:
    """What is in the catalog. A disk that does not do is no reason not to serve; whoever needs the catalog is told."""
    store = CatalogStore(database)
    try:
        book, is_known = CatalogBook(store.all()), True
    except StorageUnavailable as error:
        log.error("the catalog cannot be read: %s", error)
        book, is_known = CatalogBook(), False

    async def glance(reference: str) -> tuple[Sight, Path]:
        return await asyncio.to_thread(seen, reference)

    def seen(reference: str) -> tuple[Sight, Path]:
        path = resolve(reference)
        return sight_of(path, settings), path

    records, examine = CatalogRecords(database, store), HashingProcess(digests)
    is_alone = is_known and not store.left_out and not lifeline
    return Keeping(book, records, glance, examine, is_known, is_alone, database.path.parent / FETCHED_NAME)


class _Program:
    """One run of the service."""

    def __init__(
        self,
        settings: Settings,
        token: str,
        engines: Mapping[str, Engine],
        plan: Plan,
        digests: Digests,
        keeping: Keeping,
        artifacts: ArtifactStore,
        plugins: Plugins,
    ) -> None:
        self._digests = digests
        library = plan.builder.library
        self._orchestrator, service = wire(
            settings,
            engines,
            plan,
            digest=lambda path: asyncio.to_thread(digests.of, path),
            clock=SystemClock(),
            look=lambda reference: asyncio.to_thread(library.look, reference),
            keeping=keeping,
            artifacts=artifacts,
            plugins=plugins,
        )
        app = build_app(service, token=token, settings=settings)
        self._server = _Server(
            uvicorn.Config(
                app,
                http=HttpProtocol,
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=settings.logs.level == "debug",
                server_header=False,
                proxy_headers=False,  # nothing here asks where a request came from
                timeout_graceful_shutdown=SHUTDOWN_LIMIT_S,
            )
        )
        self._told_to_end = asyncio.Event()
        self._told_again = asyncio.Event()

    async def run(self, listener: socket.socket, *, lifeline: bool) -> int:
        self._listen_for_the_end(lifeline=lifeline)
        async with asyncio.TaskGroup() as group:
            orchestration = group.create_task(self._orchestrator.run(), name="orchestrator")
            http = group.create_task(self._server.serve(sockets=[listener]), name="http")
            host, port = listener.getsockname()[:2]
            where = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
            log.info("listening on %s", where)
            print(f"listening on {where}", flush=True)
            told = group.create_task(self._told_to_end.wait(), name="told")
            await asyncio.wait((told, http), return_when=asyncio.FIRST_COMPLETED)
            told.cancel()
            log.info("draining: no new tasks, running ones may end")
            await self._finish_or_hurry(group)
            self._digests.stop()
            # First the streams, which get their last frames, then the connections that carry them.
            orchestration.cancel()
            await asyncio.wait((orchestration,))
            self._server.should_exit = True
            await http
        return 0

    async def _finish_or_hurry(self, group: asyncio.TaskGroup) -> None:
        """Let running tasks end, unless told to end a second time."""
        drain = group.create_task(self._orchestrator.drain(), name="drain")
        hurry = group.create_task(self._told_again.wait(), name="hurry")
        await asyncio.wait((drain, hurry), return_when=asyncio.FIRST_COMPLETED)
        drain.cancel()
        hurry.cancel()

    def _listen_for_the_end(self, *, lifeline: bool) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end)
        if lifeline:
            loop.add_reader(sys.stdin.fileno(), self._read_lifeline)

    def _end(self) -> None:
        if self._told_to_end.is_set():
            self._told_again.set()
        self._told_to_end.set()

    def _read_lifeline(self) -> None:
        """Standard input closed: whoever started us is gone, and nobody waits for answers any more."""
        if not os.read(sys.stdin.fileno(), 4096):
            asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
            self._told_to_end.set()
            self._told_again.set()


class _Server(uvicorn.Server):
    """Signals are ours: uvicorn would end open streams at once and raise the signal again on its way out."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _allow_descriptors(settings: Settings) -> None:
    """A stream is a descriptor, and so is a connection to a worker: take what the system grants us at most."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = settings.server.max_streams + SPARE_DESCRIPTORS
    if soft < needed:
        granted = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (granted, hard))
        if granted < needed:
            streams = settings.server.max_streams
            log.warning("only %d descriptors are granted; server.max_streams %d may not be reached", granted, streams)


def _bind(settings: Settings) -> socket.socket:
    host, port = settings.server.host, settings.server.port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise OSError(f"cannot listen on {host} port {port}: {error.strerror}; choose another with --port") from error


def _engines(settings: Settings) -> dict[str, Engine]:
    llamacpp = settings.engines.llamacpp
    return build_engines(
        llamacpp.launcher, llamacpp.binary, llamacpp.extra_args, servers=settings.engines.openai.servers
    )


def _can_use_cuda(settings: Settings, uuids: tuple[str, ...]) -> bool:
    """Whether llama.cpp as installed computes on NVIDIA cards. The user's own binary is taken to."""
    if settings.engines.llamacpp.launcher == "binary":
        return True
    try:
        answer = subprocess.run(
            [sys.executable, "-P", "-m", "llama_orch.workers.probe"],
            env=worker_environment(os.environ, uuids),
            capture_output=True,
            timeout=PROBE_LIMIT_S,
            check=True,
        )
        return any(name.startswith("CUDA") for name in json.loads(answer.stdout))
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        log.warning("llama.cpp could not be asked for its devices: %s", error)
        return False
