"""The real service as a process of its own, for tests that need the whole of it. Knows the command line, not the code.

with live_service({"pools": [...]}) as service:
    httpx.get(service.url + "/v1/pools", headers=service.headers)
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

TOKEN = "live-0123456789abcdef0123456789abcdef"
START_LIMIT_S = 120.0  # a start that hangs fails; nothing waits for it
END_LIMIT_S = 60.0
SAID = "listening on "
# Workers' threads that wait for one another sleep. By default they spin, and where other programs want the cores, as
# other tests do, twenty tokens took twenty seconds now and then.
_PATIENT = {"OMP_WAIT_POLICY": "passive"}
PROGRAM = [sys.executable, "-P", "-m", "llama_orch.cli"]  # tests/contract/mutants puts another one here


class ServiceFailed(Exception):
    """The service did not start, or did not end as it should."""


@dataclass(frozen=True)
class LiveService:
    """A service that listens. Its pools may still be loading: a task waits for them, and so does who reads its
    stream."""

    url: str
    token: str
    process: subprocess.Popen[bytes]
    home: Path
    log_path: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}

    def log(self) -> list[dict[str, Any]]:
        """What the service has logged so far, one entry per whole line."""
        lines = self.log_path.read_text(errors="replace").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n") and line.startswith("{")]


@contextmanager
def live_service(
    configuration: Mapping[str, Any] | None = None,
    *,
    token: str = TOKEN,
    env: Mapping[str, str] | None = None,
    home: Path | None = None,
) -> Iterator[LiveService]:
    """Start the service with this configuration on a free port, in a home of its own unless one is given; end it with
    the block.

    It ends because its standard input closes, as it would if this process died. One that does not end is killed, and
    that is a failure. `env` is added to the environment.
    """
    with tempfile.TemporaryDirectory(prefix="llorch-live-") as folder:
        home, config, log_path = home or Path(folder, "home"), Path(folder, "config.yaml"), Path(folder, "service.log")
        config.write_text(json.dumps(configuration or {}))  # JSON is YAML
        with log_path.open("wb") as log, _process(config, log, _environment(home, token, env or {})) as process:
            yield LiveService(_listening(process, log_path), token, process, home, log_path)


def _environment(home: Path, token: str, more: Mapping[str, str]) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("LLORCH_")}
    return inherited | {"LLORCH_HOME": str(home), "LLORCH_API_TOKEN": token, **_PATIENT} | dict(more)


@contextmanager
def _process(config: Path, log: IO[bytes], environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [*PROGRAM, "serve", "--port", "0", "--lifeline", "--config", str(config)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        env=environment,
    )
    try:
        yield process
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
    try:
        process.wait(END_LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise ServiceFailed(f"the service did not end within {END_LIMIT_S:g} s of its standard input's end") from None


def _listening(process: subprocess.Popen[bytes], log_path: Path) -> str:
    """The URL that the service prints once it listens."""
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        line = process.stdout.readline().decode() if selector.select(START_LIMIT_S) else ""
    if not line.startswith(SAID):
        raise ServiceFailed(f"the service did not start; it said {line!r} and logged:\n{log_path.read_text()}")
    return line.removeprefix(SAID).strip()
