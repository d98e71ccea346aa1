"""A server for the length of one command.

It is a child process that ends when its stdin does, so it goes with this process whatever way this process goes,
kill -9 included. It has a session of its own: a Ctrl-C in the terminal is the command's to handle, which cancels the
task first.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from llama_orch.settings import SettingsError

START_TIMEOUT_S = 300.0  # a large model is read from a disk
STOP_TIMEOUT_S = 15.0
_ANNOUNCEMENT = "listening on "
_LOG_TAIL_LINES = 10
_LOG_TAIL_BYTES = 1 << 16


class StartError(Exception):
    """The server did not come up. `log_tail` is the end of its log."""

    def __init__(self, message: str, log_tail: list[str]) -> None:
        super().__init__(message)
        self.log_tail = log_tail


def serve_command(config: str | None) -> list[str]:
    """The server's command line; it holds no token."""
    command = [
        sys.executable,
        "-P",
        "-m",
        "llama_orch.cli",
        "serve",
        "--host",
        "127.0.0.1",
        "--port",
        "0",
        "--lifeline",
    ]
    return command + (["--config", config] if config else [])


def _open_log(log_file: Path) -> IO[bytes]:
    try:
        log_file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return open(os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600), "wb")
    except OSError as error:
        raise SettingsError([f"{log_file}: {error.strerror}; set LLORCH_HOME to a folder of yours"]) from error


@contextmanager
def own_server(command: list[str], env: Mapping[str, str], log_file: Path) -> Iterator[str]:
    """Run the server; yields its URL once it listens, and leaves nothing behind."""
    with _open_log(log_file) as log:
        server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=dict(env), start_new_session=True
        )
    try:
        yield _wait_until_it_listens(server, log_file)
    finally:
        _stop(server)


def _wait_until_it_listens(server: subprocess.Popen[bytes], log_file: Path) -> str:
    assert server.stdout is not None
    line = _read_line(server.stdout, time.monotonic() + START_TIMEOUT_S)
    if line.startswith(_ANNOUNCEMENT):
        return line.removeprefix(_ANNOUNCEMENT).strip()
    why = f"said {line!r}" if line else "ended, or did not listen in time"
    raise StartError(f"the server could not be started: it {why}; its log is {log_file}", log_tail(log_file))


def _read_line(stdout: IO[bytes], deadline: float) -> str:
    """The first line; empty where the output ends or the time is up before there is one."""
    line = b""
    while not line.endswith(b"\n"):
        is_readable = select.select([stdout], [], [], max(0.0, deadline - time.monotonic()))[0]
        chunk = os.read(stdout.fileno(), 1) if is_readable else b""
        if not chunk:
            return ""
        line += chunk
    return line.decode("utf-8", "replace").strip()


def log_tail(log_file: Path) -> list[str]:
    with contextlib.suppress(OSError), log_file.open("rb") as log:
        log.seek(max(0, os.fstat(log.fileno()).st_size - _LOG_TAIL_BYTES))
        return log.read().decode("utf-8", "replace").splitlines()[-_LOG_TAIL_LINES:]
    return []


def _stop(server: subprocess.Popen[bytes]) -> None:
    """Close its stdin, which tells it to end; then ask, then force. An impatient Ctrl-C skips the waiting."""
    assert server.stdin is not None
    assert server.stdout is not None
    try:
        with contextlib.suppress(BrokenPipeError):
            server.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(STOP_TIMEOUT_S)
        if server.poll() is None:
            server.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(STOP_TIMEOUT_S)
    finally:
        if server.poll() is None:
            server.kill()
            server.wait()
        server.stdout.close()
