"""A service, a home folder of its own and ways to run the command line against them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from contract_service import ContractService, Task
from typer.testing import CliRunner, Result

from llama_orch.cli.main import app

TASK_ID = "3f2b8c1e-9d5a-4c57-8a43-0c7d5b1f2e90"
Invoke = Callable[..., Result]

# The program with a stand-in for its own server, and with a default address where nobody listens.
_WITH_FAKE_SERVER = """
import sys
from llama_orch.cli import connection, own_server
from llama_orch.cli.main import main
connection.DEFAULT_URL, program = sys.argv[1:3]
own_server.serve_command = lambda config: [sys.executable, program]
sys.argv[1:] = sys.argv[3:]
main()
"""


@pytest.fixture
def service() -> Iterator[ContractService]:
    with ContractService() as service:
        yield service


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "home"
    folder.mkdir(mode=0o700)
    return folder


@pytest.fixture
def env(home: Path) -> dict[str, str]:
    """The environment of a program without any of our variables but the home folder."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LLORCH_")}
    return kept | {"LLORCH_HOME": str(home), "PYTHONUNBUFFERED": "1", "COLUMNS": "200"}


@pytest.fixture
def llama_orch(home: Path, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """Run the program; keywords are environment variables."""
    for name in ("LLORCH_URL", "LLORCH_API_TOKEN", "LLORCH_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LLORCH_HOME", str(home))
    return lambda *arguments, **env: CliRunner().invoke(app, arguments, env=env)


@pytest.fixture
def remote(llama_orch: Invoke, service: ContractService) -> Invoke:
    """Run the program against the service, which has one task."""
    service.tasks[TASK_ID] = Task({"prompt": "forever"})
    here = {"LLORCH_URL": service.url, "LLORCH_API_TOKEN": service.token}
    return lambda *arguments, **env: llama_orch(*arguments, **(here | env))


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(env: dict[str, str]) -> Iterator[Start]:
    """Start `llama-orch …` as a process; what is left at the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str, extra: dict[str, str] | None = None, **more: Any) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        streams = {"stdin": subprocess.DEVNULL, "stdout": pipe, "stderr": pipe} | more
        command = [sys.executable, "-m", "llama_orch.cli", *arguments]
        process = subprocess.Popen(command, env=env | (extra or {}), text=True, encoding="utf-8", **streams)
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture
def program_with_fake_server(closed_url: str) -> list[str]:
    """The arguments of an interpreter that runs the program where no server is at hand."""
    return ["-c", _WITH_FAKE_SERVER, closed_url, str(Path(__file__).with_name("contract_service.py"))]


@pytest.fixture
def closed_url() -> Iterator[str]:
    """An address where connections are refused: bound, so that nobody else takes it, and not listening."""
    import socket

    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{holder.getsockname()[1]}"
