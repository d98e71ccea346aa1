"""One service to a home folder, and the servers of single commands beside it. On real processes."""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.live.client import LIMIT_S, descendants, is_running, until

pytestmark = pytest.mark.xdist_group("death")

_PROGRAM = [sys.executable, "-P", "-m", "llama_orch.cli"]
_SAID = "listening on "
_POOLS = [{"id": "default", "ctx": 256, "max_tokens": 8}]
# `run` looks for a server at the default address first; here nobody listens there.
_RUN = """
import sys
from llama_orch.cli import connection
from llama_orch.cli.main import main
connection.DEFAULT_URL = sys.argv.pop(1)
main()
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def _environment(home: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LLORCH_")}
    return kept | {"LLORCH_HOME": str(home)}


def _configuration(folder: Path, pools: list[dict[str, Any]]) -> Path:
    path = folder / f"{len(list(folder.iterdir()))}.yaml"
    path.write_text(json.dumps({"pools": pools}))
    return path


@contextmanager
def a_service(home: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """`llama-orch serve` as a person starts it, and its URL; ended with the block where the test has not ended it."""
    command = [*_PROGRAM, "serve", "--port", "0", "--config", str(_configuration(home.parent, _POOLS))]
    log = (home.parent / "service.log").open("ab")
    with log, subprocess.Popen(command, env=_environment(home), stdout=subprocess.PIPE, stderr=log) as service:
        try:
            yield service, _first_line(service).removeprefix(_SAID).strip()
        finally:
            service.terminate()


def _first_line(service: subprocess.Popen[bytes]) -> str:
    assert service.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(service.stdout, selectors.EVENT_READ)
        assert selector.select(LIMIT_S), "the service said nothing"
        line = service.stdout.readline().decode()
    assert line.startswith(_SAID), line
    return line


def _answers(url: str) -> bool:
    return httpx.get(f"{url}/healthz", trust_env=False).status_code == 200


def _second(home: Path, url: str) -> subprocess.CompletedProcess[str]:
    """Another `serve` on the same home folder; its port is taken and its model is missing as well."""
    config = _configuration(home.parent, [{"id": "default", "model": f"file:{home}/missing.gguf"}])
    command = [*_PROGRAM, "serve", "--port", url.rpartition(":")[2], "--config", str(config)]
    return subprocess.run(command, env=_environment(home), capture_output=True, text=True, timeout=LIMIT_S, check=False)


def test_a_second_service_refuses(home: Path) -> None:
    """It names the first one's process and the folder, before it looks at anything else; the first one goes on."""
    with a_service(home) as (first, url):
        second = _second(home, url)
        assert second.returncode == 1
        assert second.stdout == ""
        assert second.stderr == (
            f"error: another service (process {first.pid}) runs on the home folder {home}: "
            "stop it first, or set LLORCH_HOME to another folder\n"
        )
        assert _answers(url)
        assert first.poll() is None


def test_another_home_is_another_service(home: Path, tmp_path: Path) -> None:
    """The lock is the folder's and not the machine's."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with a_service(home) as (_, url), a_service(elsewhere / "home") as (_, other):
        assert _answers(url)
        assert _answers(other)


@pytest.mark.spec("HP-PLC-7")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_lock_ends_with_its_service(home: Path, number: signal.Signals) -> None:
    """After SIGKILL, as after an orderly end, the next one starts at once: no worker inherits the lock."""
    with a_service(home) as (first, _):
        until(lambda: bool(descendants(first.pid)))
        below = descendants(first.pid)
        first.send_signal(number)
        first.wait(LIMIT_S)
        with a_service(home) as (second, url):
            assert _answers(url)
            assert int((home / "lock").read_text()) == second.pid
        until(lambda: not any(is_running(pid) for pid in below))


def test_a_home_that_cannot_be_locked_says_so(home: Path) -> None:
    """Something else has the lock's name: a sentence and exit code 1, no traceback."""
    (home / "lock").mkdir(parents=True)
    ended = _second(home, "http://127.0.0.1:0")
    assert ended.returncode == 1
    assert ended.stderr == f"error: {home}/lock: Is a directory; set LLORCH_HOME to a folder of yours\n"


@pytest.fixture
def closed_url() -> Iterator[str]:
    """An address where connections are refused: bound, so that nobody else takes it, and not listening."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{holder.getsockname()[1]}"


def _start_run(environment: Mapping[str, str], closed_url: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-P", "-c", _RUN, closed_url, "run", "Once upon a time", "--seed", "7"]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True)


def _two_runs(home: Path, closed_url: str) -> None:
    config = _configuration(home.parent, _POOLS)
    environment = _environment(home) | {"LLORCH_CONFIG": str(config)}
    with _start_run(environment, closed_url) as one, _start_run(environment, closed_url) as other:
        ends = [run.communicate(timeout=2 * LIMIT_S) for run in (one, other)]
        assert [one.returncode, other.returncode] == [0, 0], ends
    texts = [out for out, _ in ends]
    assert texts[0] == texts[1] != ""
    assert all("starting one for this command" in err for _, err in ends)


def test_two_commands_with_servers_of_their_own(home: Path, closed_url: str) -> None:
    """Two `run`s at the same time in a fresh home: both work, with one token that either of them made."""
    _two_runs(home, closed_url)
    assert (home / "token").read_text().strip()
    assert not (home / "lock").exists()


def test_commands_with_servers_of_their_own_beside_a_service(home: Path, closed_url: str) -> None:
    """A `serve` that listens elsewhere holds the lock; they do not need it, and it does not notice them."""
    with a_service(home) as (service, url):
        _two_runs(home, closed_url)
        assert _answers(url)
        assert int((home / "lock").read_text()) == service.pid
