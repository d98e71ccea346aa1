"""A client over a real socket that keeps what it saw. The wait for a condition ends with the test's own limit."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

import httpx

from tests.live_service import LiveService
from tests.runtime.frames import Seen, check_order, parse

LIMIT_S = 60.0
ENGINES = ("llamacpp", "ctransformers")


def open_client(service: LiveService) -> httpx.Client:
    limits = httpx.Limits(max_connections=64)
    return httpx.Client(base_url=service.url, headers=service.headers, timeout=LIMIT_S, limits=limits, trust_env=False)


def submit(client: httpx.Client, **body: Any) -> dict[str, Any]:
    prompt = {} if body.keys() & {"inputs", "messages"} else {"prompt": "Once upon a time"}
    answer = client.post("/v1/tasks", json={"model_ref": "builtin:tiny", **prompt, **body})
    assert answer.status_code == 202, answer.text
    admission: dict[str, Any] = answer.json()
    return admission


def stream(client: httpx.Client, task_id: str, **headers: str) -> list[Seen]:
    """All frames until the last."""
    with client.stream("GET", f"/v1/tasks/{task_id}/stream", headers=headers) as answer:
        assert answer.status_code == 200, answer.read()
        return list(_frames(answer))


def finish(client: httpx.Client, **body: Any) -> list[Seen]:
    frames = stream(client, submit(client, **body)["task_id"])
    check_order(frames)
    return frames


@contextmanager
def live_frames(client: httpx.Client, task_id: str) -> Iterator[Iterator[Seen]]:
    """Frames as they come, for a test that acts in mid-stream."""
    with client.stream("GET", f"/v1/tasks/{task_id}/stream") as answer:
        yield _frames(answer)


def _frames(answer: httpx.Response) -> Iterator[Seen]:
    """Comments keep the connection alive for as long as the task waits: the test does not wait that long."""
    deadline = time.monotonic() + LIMIT_S
    held = b""
    for piece in answer.iter_bytes():
        assert time.monotonic() < deadline, "the stream did not end in time"
        held += piece
        *whole, held = held.split(b"\n\n")
        for block in whole:
            if not block.startswith(b":"):
                yield from parse(block + b"\n\n")


def until(condition: Callable[[], bool], limit_s: float = LIMIT_S) -> None:
    """Look again and again, with a pause that nothing can wake."""
    deadline = time.monotonic() + limit_s
    pause = Event()
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        pause.wait(0.02)


def descendants(pid: int) -> list[int]:
    """Processes below `pid`, workers' children included, from /proc."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it ended while we looked
            parents.setdefault(int(fields[1]), []).append(int(entry.name))
    found = list(parents.get(pid, []))
    for child in found:
        found.extend(parents.get(child, []))
    return found


def is_running(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def workers(service: LiveService) -> dict[str, int]:
    """Worker process by the last part of its module's name."""
    found = {}
    for pid in descendants(service.pid):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        for word in words:
            if word.startswith(b"llama_orch.workers."):
                found[word.decode().rpartition(".")[2]] = pid
    return found


def kill(pid: int) -> None:
    os.kill(pid, 9)
