"""What dies, and what must not: the service, a worker, a client. On real engines and real processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.live.client import (
    descendants,
    finish,
    is_running,
    kill,
    live_frames,
    open_client,
    stream,
    submit,
    until,
    workers,
)
from tests.live.conftest import POOLS
from tests.live_service import LiveService, live_service
from tests.runtime.frames import check_order, events

pytestmark = pytest.mark.xdist_group("death")

# No end of text within the limit: a story that goes on while the test acts.
LONG = {"max_tokens": 1900, "sampling": {"temperature": 1.5, "top_k": 0, "top_p": 1.0, "min_p": 0.0}}


def all_ready(service: LiveService) -> bool:
    with open_client(service) as client:
        return all(pool["ready"] for pool in client.get("/v1/pools").json()["items"])


@pytest.mark.spec("HP-PLC-7")
def test_kill_9_of_the_service_leaves_no_worker() -> None:
    """Two seconds after SIGKILL no process of it runs."""
    with live_service({"pools": POOLS}) as service:
        until(lambda: all_ready(service))
        below = descendants(service.pid)
        assert set(workers(service)) == {"llamacpp", "ctransformers"}
        kill(service.pid)
        until(lambda: not any(is_running(pid) for pid in below), limit_s=2.0)


@pytest.mark.spec("HP-PLC-7", "HP-ERR-4")
def test_kill_9_of_a_worker_in_mid_stream() -> None:
    """Its stream ends with WORKER_RESET, the other engine's stream goes on, and the pool recovers by itself."""
    with live_service({"pools": POOLS}) as service, open_client(service) as client:
        until(lambda: all_ready(service))
        doomed = submit(client, engine="llamacpp", inputs=["Once upon a time"] * 64, **LONG)["task_id"]
        other = submit(client, engine="ctransformers", max_tokens=400, prompt="Once upon a time")["task_id"]
        with live_frames(client, doomed) as frames:
            for frame in frames:
                if frame.event == "token":
                    break
            kill(workers(service)["llamacpp"])
            last = list(frames)[-1]
        assert (last.event, last.data["code"], last.data["retriable"]) == ("error", "WORKER_RESET", True)
        assert stream(client, other)[-1].event == "end"
        assert finish(client, engine="llamacpp", max_tokens=8)[-1].event == "end"
        health = client.get("/v1/pools/default/health").json()
        assert (health["ready"], health["replicas"][0]["restarts"]) == (True, 1)
        assert "SIGKILL" in health["replicas"][0]["last_error"]


@pytest.mark.spec("HP-PLC-7")
def test_a_model_that_does_not_load_is_reported(tmp_path: Path) -> None:
    """A damaged file is refused before the service listens, with the reason and without a traceback."""
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(b"GGUF\x03\0\0\0" + b"\xff" * 64)
    config = tmp_path / "config.yaml"
    config.write_text(f'pools: [{{model: "file:{damaged}"}}]')
    command = [sys.executable, "-P", "-m", "llama_orch.cli", "serve", "--port", "0", "--config", str(config)]
    env = {**os.environ, "LLORCH_HOME": str(tmp_path / "home")}
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert "pool default:" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.spec("HP-PLC-5")
def test_a_model_that_fits_no_device_is_refused_with_the_figures_and_the_service_is_up() -> None:
    """Its pool says why and answers 503; the other pool serves."""
    cards = [{"id": "big", "backend": "simulated", "vram_bytes": 24 << 30}]
    cards.append({"id": "small", "backend": "simulated", "vram_bytes": 300 << 20})
    pools = [{"id": "default", "devices": ["big"]}, {"id": "second", "devices": ["small"], "engine": "ctransformers"}]
    with live_service({"devices": cards, "pools": pools}) as service, open_client(service) as client:
        assert finish(client, engine="llamacpp", max_tokens=4)[-1].event == "end"
        health = client.get("/v1/pools/second/health").json()
        assert (health["live"], health["replicas"][0]["state"]) == (False, "failed")
        assert "needs" in health["last_error"]
        assert "device small" in health["last_error"]
        body = {"model_ref": "builtin:tiny", "engine": "ctransformers", "prompt": "Once"}
        refused = client.post("/v1/tasks", json=body)
        assert (refused.status_code, refused.json()["code"]) == (503, "POOL_UNAVAILABLE")
        assert "needs" in refused.json()["message"]


def test_sigterm_lets_running_tasks_end_and_exits_0() -> None:
    """The stream that was open gets its end; newcomers are told to come back; the exit code is 0; nothing stays."""
    with live_service({"pools": POOLS}) as service, open_client(service) as client:
        until(lambda: all_ready(service))
        task_id = submit(client, inputs=["Once upon a time"] * 8, max_tokens=64)["task_id"]
        below = descendants(service.pid)
        with live_frames(client, task_id) as frames:
            for frame in frames:
                if frame.event == "token":
                    break
            os.kill(service.pid, signal.SIGTERM)
            assert list(frames)[-1].event == "end"
        assert service.process.wait(30) == 0
        assert not any(is_running(pid) for pid in below)


def test_a_second_sigterm_ends_at_once() -> None:
    """Who does not want to wait for running tasks says it twice."""
    with live_service({"pools": POOLS}) as service, open_client(service) as client:
        until(lambda: all_ready(service))
        task_id = submit(client, inputs=["Once upon a time"] * 256, **LONG)["task_id"]
        with live_frames(client, task_id) as frames:
            next(frames)
            os.kill(service.pid, signal.SIGTERM)
            until(lambda: any("draining" in line["message"] for line in service.log()))
            os.kill(service.pid, signal.SIGTERM)
            assert list(frames)[-1].data["code"] == "CANCELED"
        assert service.process.wait(20) == 0


@pytest.mark.spec("HP-STR-7")
def test_a_reader_that_never_reads_blocks_nobody() -> None:
    """A client that opens a stream and takes no byte of it holds up neither its own task nor another reader."""
    with live_service({"pools": POOLS}) as service, open_client(service) as client:
        task_id = submit(client, inputs=["Once upon a time"] * 16, **LONG)["task_id"]
        host, port = service.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            request = f"GET /v1/tasks/{task_id}/stream HTTP/1.1\r\nHost: {host}:{port}\r\n"
            deaf.sendall(f"{request}Authorization: Bearer {service.token}\r\n\r\n".encode())
            frames = stream(client, task_id)
        check_order(frames)
        assert frames[-1].event == "end"
        until(lambda: "streams_open 0.0" in client.get("/metrics").text)


@pytest.mark.spec("HP-STR-7")
def test_a_client_that_goes_away_leaves_its_task_running() -> None:
    """A broken connection closes the reader, not the task: the stream can be opened again and is complete."""
    with live_service({"pools": POOLS}) as service, open_client(service) as client:
        task_id = submit(client, inputs=["Once upon a time"] * 4, max_tokens=64)["task_id"]
        with live_frames(client, task_id) as frames:
            assert next(frames).event == "started"
        again = stream(client, task_id)
        check_order(again)
        assert events(again)[-1] == "end"


@pytest.mark.spec("HP-SEC-1", "HP-SEC-7")
def test_workers_listen_on_no_port_and_show_no_secret() -> None:
    """The service's one TCP listener is on loopback; workers have none; no command line or environment has a secret."""
    with live_service({"pools": POOLS}) as service:
        until(lambda: all_ready(service))
        family = [service.pid, *descendants(service.pid)]
        sockets = {link for pid in family for link in _sockets(pid)}
        listeners = [row for row in _tcp_listeners() if row[1] in sockets]
        assert [address.split(":")[0] for address, _ in listeners] == ["0100007F"]  # 127.0.0.1
        for pid in family:
            assert service.token.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
        for pid in family[1:]:
            assert service.token.encode() not in Path(f"/proc/{pid}/environ").read_bytes()


def _sockets(pid: int) -> list[str]:
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = os.readlink(entry)
        except OSError:
            continue
        if target.startswith("socket:["):
            found.append(target[8:-1])
    return found


def _tcp_listeners() -> list[tuple[str, str]]:
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return [(row[1], row[9]) for row in rows if row[3] == "0A"]
