"""Ray on this machine, and on loopback only: the example of examples/ray as its page starts it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import pytest

import llama_orch

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "ray"
LOOPBACK = Path(__file__).with_name("loopback")
TINY = Path(llama_orch.__file__).parent / "models" / "tiny.gguf"
START_LIMIT_S = 240.0
END_LIMIT_S = 60.0
# Without the first of these Ray takes 127.0.0.1 for the machine's address in its network, and listens to all of it.
LOOPBACK_ONLY = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_enable_metrics_collection": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
}


def free_port() -> int:
    """Below the ports that Ray hands to its workers."""
    for port in range(7400, 9900):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("no port is free")


@contextmanager
def program(name: str, *arguments: str, env: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A program of this environment, until the end of the block, and then what it has started."""
    with (
        log.open("wb") as said,
        subprocess.Popen(
            [str(Path(sys.executable).with_name(name)), *arguments],
            cwd=EXAMPLE,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as process,
    ):
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(END_LIMIT_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def wait_for(process: subprocess.Popen[bytes], log: Path, is_there: Any) -> None:
    deadline, pause = time.monotonic() + START_LIMIT_S, Event()
    while not is_there():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        pause.wait(0.2)


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="session")
def serve_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Two replicas behind Serve's proxy; its root URL."""
    folder = tmp_path_factory.mktemp("ray")
    home = Path(tempfile.mkdtemp(prefix="llorch-ray-"))  # short: Ray's sockets have long names
    env = {**os.environ, **LOOPBACK_ONLY, "HOME": str(home), "PYTHONPATH": f"{EXAMPLE}:{LOOPBACK}"}
    gcs = free_port()
    head = ["start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={gcs}", "--include-dashboard=false"]
    size = ["--num-cpus=2", "--object-store-memory=80000000", "--disable-usage-stats", f"--temp-dir={home}/r"]
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, home, ignore_errors=True)
        log = folder / "ray.log"
        ray = stack.enter_context(program("ray", *head, *size, env=env, log=log))
        wait_for(ray, log, lambda: listens(gcs))
        http = free_port()
        config = (EXAMPLE / "serve.yaml").read_text().replace("port: 8000", f"port: {http}")
        config = config.replace("args: {replicas: 2}", f"args: {{replicas: 2, model: {json.dumps(str(TINY))}}}")
        (folder / "serve.yaml").write_text(config)
        log = folder / "serve.log"
        arguments = ["run", "--address", f"127.0.0.1:{gcs}", str(folder / "serve.yaml")]
        serve = stack.enter_context(program("serve", *arguments, env=env, log=log))
        url = f"http://127.0.0.1:{http}"
        wait_for(serve, log, lambda: answers(f"{url}/v1/models"))
        yield url
