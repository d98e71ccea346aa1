"""A worker's process: spawned in a session of its own, watched, and ended so that nothing of it stays behind.

Invariant: once `ready` has raised or `stop` has returned, no process of the worker's session runs and its private
folder is gone. The protocol with the child is in workers/lifeline.py. There is no task in here: asyncio's subprocess
transport calls back, and the coroutines wait for what the callbacks found.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import cast

import msgspec

from llama_orch.engines.base import LoadFailed, load_failed
from llama_orch.engines.private_folder import make_private_folder, record_worker, remove_private_folder
from llama_orch.engines.processes import session_members
from llama_orch.engines.worker_log import WorkerLog

STALL_TIMEOUT_S = 120.0
_TERM_WAIT_S = 2.0
_KILL_WAIT_S = 10.0  # a process in an uninterruptible driver call can outlast any signal
_PIPES_WAIT_S = 2.0  # the last words of a dead process; a grandchild may hold the pipes open for longer
_READY_LINE_BYTES_MAX = 1 << 16
_POLL_S = 0.01

_SCRUBBED = re.compile(
    r"(LLAMA|GGML|LLORCH|MTMD|PYTHON|HF|HUGGING_FACE|LD_PRELOAD|LD_AUDIT|CUDA_VISIBLE_DEVICES|CUDA_DEVICE_ORDER)(_.*)?"
    r"|PYTHON.*|.*_PROXY|.*(TOKEN|SECRET|PASSWORD|API_?KEY)",
    re.IGNORECASE,
)


class ReadyLine(msgspec.Struct):
    """What a worker prints on stdout, once."""

    ready: bool
    error: str = ""
    engine_version: str = ""


class WorkerProcess(asyncio.SubprocessProtocol):
    """One child process that keeps workers/lifeline.py's protocol."""

    def __init__(self, module: str, log_fields: Mapping[str, str], stall_timeout_s: float = STALL_TIMEOUT_S) -> None:
        self.folder = make_private_folder()
        self.log = WorkerLog(log_fields)
        self.pid: int | None = None
        self._module = module
        self._stall_timeout_s = stall_timeout_s
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.SubprocessTransport | None = None
        self._last_output_at = self._loop.time()
        self._stdout = bytearray()
        self._said_ready = asyncio.Event()  # a whole line came, or the process is gone
        self._exited = asyncio.Event()
        self._pipes_closed = asyncio.Event()

    async def start(self, configuration: Mapping[str, object], device_uuids: tuple[str, ...], secret: str) -> None:
        """Spawn the child and hand it its configuration. `secret` is struck from whatever the child logs."""
        self.log.redact(secret)
        command = (sys.executable, "-P", "-m", self._module)
        environment = worker_environment(os.environ, device_uuids)
        try:
            transport, _ = await self._loop.subprocess_exec(
                lambda: self, *command, env=environment, cwd=self.folder, start_new_session=True
            )
        except BaseException as error:
            remove_private_folder(self.folder)
            if isinstance(error, OSError):
                raise load_failed(f"the worker's process could not be started: {error.strerror}") from error
            raise
        self._transport = transport
        self.pid = transport.get_pid()
        self._last_output_at = self._loop.time()
        try:
            record_worker(self.folder, self.pid)
        except OSError as error:
            await self.kill()
            raise LoadFailed(f"{self.folder}: {error.strerror or error}") from error
        line = msgspec.json.encode({**configuration, "parent_pid": os.getpid()}) + b"\n"
        # Typed as any transport, and uvloop's is no subclass of asyncio.WriteTransport; stdin is one that writes.
        cast(asyncio.WriteTransport, transport.get_pipe_transport(0)).write(line)

    async def ready(self) -> ReadyLine:
        """The child's ready line. Raises LoadFailed, with nothing left behind, when it fails, dies or stalls: a load
        may take as long as it needs, but not be silent for longer than the stall timeout."""
        try:
            await self._wait_for_ready_line()
            if not self._stdout:
                how = await self.lost()
                raise load_failed(f"the worker ended while it loaded the model: {self._load_error(how)}")
            try:
                line = msgspec.json.decode(self._stdout, type=ReadyLine)
            except msgspec.DecodeError as error:
                raise LoadFailed("the worker's ready line is not what was agreed") from error
            if not line.ready:
                await self._last_words()
                raise load_failed(self._load_error(line.error))
            return line
        except BaseException:
            await self.kill()
            raise

    async def lost(self) -> str:
        """Return when the process has exited, with the reason as one line."""
        await self._exited.wait()
        await self._last_words()
        assert self._transport is not None
        how = exit_reason(self._transport.get_returncode())
        return f"{how}; {self.log.fatal_error}" if self.log.fatal_error else how

    async def stop(self, grace_s: float) -> None:
        """End the child in order: end of stdin, SIGTERM, SIGKILL; then whatever else runs in its session. Idempotent.
        Cancelled, it goes straight to SIGKILL."""
        try:
            if self._transport is not None and not self._exited.is_set():
                stdin = self._transport.get_pipe_transport(0)
                if stdin is not None:
                    stdin.close()
                if not await self._exits_within(grace_s):
                    self._signal(signal.SIGTERM)
                    await self._exits_within(_TERM_WAIT_S)
        finally:
            await self.kill()

    async def kill(self) -> None:
        """End the child and its session at once, and wait until both are gone. Idempotent."""
        if self._transport is not None:
            self._signal(signal.SIGKILL)
            if not await self._exits_within(_KILL_WAIT_S):
                self.log.say(logging.ERROR, f"process {self.pid} does not end, not even by SIGKILL")
            await self._end_session()
            self._transport.close()
        remove_private_folder(self.folder)

    def kill_soon(self) -> None:
        """End the child without waiting, so that `lost` returns and the replica is replaced."""
        self._signal(signal.SIGKILL)

    # What asyncio's transport calls.

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        self._last_output_at = self._loop.time()
        if fd == 2:
            self.log.feed(data)
        elif len(self._stdout) < _READY_LINE_BYTES_MAX:
            self._stdout += data
            if b"\n" in data:
                self._said_ready.set()

    def process_exited(self) -> None:
        self._exited.set()
        self._said_ready.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.log.flush()
        self._pipes_closed.set()

    # Parts.

    def _load_error(self, otherwise: str) -> str:
        return self.log.fatal_error or self.log.first_error or otherwise or "it gave no reason"

    async def _wait_for_ready_line(self) -> None:
        while not self._said_ready.is_set():
            left = self._last_output_at + self._stall_timeout_s - self._loop.time()
            if left <= 0:
                raise LoadFailed(f"the worker showed no sign of progress for {self._stall_timeout_s:.0f} s")
            with suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._said_ready.wait()

    async def _exits_within(self, seconds: float) -> bool:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._exited.wait()
        return self._exited.is_set()

    async def _last_words(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(_PIPES_WAIT_S):
                await self._pipes_closed.wait()

    def _signal(self, number: signal.Signals) -> None:
        """Signal the child's whole group. The group's id cannot name another one while the child is not reaped."""
        if self.pid is not None and not self._exited.is_set():
            with suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    async def _end_session(self) -> None:
        """Kill what the child started and left behind: a grandchild keeps the session's id, and while one lives the
        kernel does not give that id to another process."""
        assert self.pid is not None
        for _ in range(int(_KILL_WAIT_S / _POLL_S)):
            members = session_members(self.pid)
            if not members:
                return
            for pid in members:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            await asyncio.sleep(_POLL_S)
        self.log.say(logging.ERROR, f"processes of session {self.pid} do not end, not even by SIGKILL")


def worker_environment(environment: Mapping[str, str], device_uuids: tuple[str, ...]) -> dict[str, str]:
    """The environment of a worker: what could change an engine's settings, send it to a proxy, load code into it or
    tell it a secret is left out, and only the given devices are visible (HP-PLC-6)."""
    kept = {name: value for name, value in environment.items() if not _SCRUBBED.fullmatch(name)}
    if "PYTHONPATH" in environment:
        entries = environment["PYTHONPATH"].split(os.pathsep)
        kept["PYTHONPATH"] = os.pathsep.join(str(Path(entry).absolute()) for entry in entries if entry)
    kept["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    kept["CUDA_VISIBLE_DEVICES"] = ",".join(device_uuids)
    return kept


def exit_reason(returncode: int | None) -> str:
    """How a process ended, in words."""
    if returncode is None:
        return "ended in an unknown way"
    if returncode >= 0:
        return f"exited with code {returncode}"
    try:
        return f"killed by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"killed by signal {-returncode}"
