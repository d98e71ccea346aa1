"""A small service that speaks the contract over real HTTP, for tests of its clients.

The prompt is the script of a task (`_SCRIPTS`), the pool that of a drain (`DRAINS`), the model that of a reload
(`RELOADS`). Run as a program it is a stand-in for `llama-orch serve --lifeline`.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from catalog_service import SmallCatalog

END = {
    "tokens_in": 2,
    "tokens_out": 2,
    "decode_time_ms": 100,
    "finish_reason": "stop",
    "seed": 7,
    "model_digest": "sha256:" + "ab" * 32,
    "engine": "simulated",
    "engine_version": "1.0",
    "sampler_profile_version": "v1",
    "kv_warmth": False,
}
METRICS = {
    "queue_depth": 3,
    "queue_position": 2,
    "predicted_start_ms": 400,
    "tokens_in": 0,
    "tokens_out": 0,
    "on_time_probability": None,
    "kv_warmth": False,
    "tokens_budget_remaining": None,
    "time_budget_remaining_ms": None,
    "cost_budget_remaining": None,
}
SESSION_ID = "7a1d0f3c-5b2e-4f6a-8c9d-1e2f3a4b5c6d"
SESSION = {
    "ttl_ms_remaining": 598200,
    "turns": 2,
    "kv_bytes": 1343488,
    "kv_warmth": True,
    "tokens_budget_remaining": 12000,
    "time_budget_remaining_ms": None,
    "cost_budget_remaining": 0.5,
}
CAPABILITIES = {
    "api_version": "2.3.0",
    "engines": [
        {
            "engine": "simulated",
            "version": "1.0",
            "workloads": ["completion"],
            "ctx_max": 2048,
            "determinism": "bytes",
            "features": [],
        }
    ],
    "pools": [],
    "devices": [
        {
            "id": "d0",
            "name": "card\x1b[31m",
            "backend": "simulated",
            "vram_total_bytes": 1 << 30,
            "vram_free_bytes": 0,
            "vram_reserved_bytes": 700 << 20,
            "problem": "lost: \x1bit fell off the bus",
        }
    ],
    "concurrency": {"recommended": 4, "slots": 4},
    "queue": {"capacity": 64, "full_policy": "reject"},
    "rate_limits": {"requests_per_second": None, "streams": 8, "body_bytes": 1024},
    "sampler_profiles": [],
    "features": [],
}
POOL = {
    "id": "default",
    "engine": "simulated",
    "engine_version": "1.0",
    "model": "builtin:tiny",
    "model_digest": None,
    "ctx": 2048,
    "slots": 4,
    "slots_total": 4,
    "max_tokens": 256,
    "sampler_profile_version": "v1",
    "queue": {"capacity": 64, "full_policy": "reject"},
    "queue_depth": {"interactive": 1, "batch": 2},
    "ready": True,
    "on_demand": False,
    "keep_alive_ms": None,
}
PASSING_POOL = POOL | {"id": "passing", "on_demand": True, "keep_alive_ms": 300_000}
REPLICA = {
    "id": "default-0",
    "devices": ["d0"],
    "state": "ready",
    "slots_busy": 0,
    "slots_total": 4,
    "restarts": 0,
    "last_error": None,
    "vram_reserved_bytes": 1536 << 20,
}
HEALTH = {
    "live": True,
    "ready": True,
    "draining": False,
    "last_error": None,
    "last_reload": None,
    "replicas": [REPLICA],
    "metrics": {"queue_depth": 3, "tokens_in": 0, "tokens_out": 0, "tokens_per_second": None},
}


def health(state: str = "ready", busy: int = 0, waiting: int = 0, **fields: Any) -> dict[str, Any]:
    """HEALTH with this of its replica, of its queue and of itself."""
    replica = REPLICA | {"state": state, "slots_busy": busy}
    return HEALTH | {"replicas": [replica], "metrics": HEALTH["metrics"] | {"queue_depth": waiting}, **fields}


def token(index: int, text: str) -> tuple[str, Any]:
    return "token", {"t": text, "i": index}


def error(code: str, **more: Any) -> dict[str, Any]:
    return {"code": code, "message": f"it is {code}", "engine": None, "correlation_id": "c-1", **more}


_HOLD = ("hold", None)  # wait until the task is canceled
_CUT = ("cut", None)  # break the connection, once
_SCRIPTS: dict[str, list[tuple[str, Any]]] = {
    "hello": [token(0, "Hello"), token(1, " wörld"), ("metrics", METRICS), ("end", END)],
    "wait": [("metrics", METRICS), ("metrics", METRICS | {"queue_position": 1}), token(0, "x"), ("end", END)],
    "forever": [token(0, "first\n"), _HOLD],
    "endless": [token(i, "line\n") for i in range(100_000)],
    "broken": [token(0, "a"), _CUT, token(1, "b"), ("end", END)],
    "gone": [token(0, "a"), ("cut", "always")],
    "hostile": [token(0, "a\x1b]0;title\x07b\x9b31m\r\n\tc"), ("end", END)],
    "lost": [token(0, "a"), ("error", error("WORKER_RESET", retriable=True))],
    "defect": [("error", error("INTERNAL"))],
    "later-frame": [("mystery", {"a": 1}), token(0, "ok"), ("end", END)],
    "late-submission": [token(0, "a"), _HOLD],
}
# The health of a pool in the answer, and then from one look to the next; the last one stays. None: the pool is gone.
_DRAINING = [
    health(busy=1, waiting=2, draining=True),
    health("backoff", draining=True),
    health("unloaded", waiting=1, draining=True),
]
DRAINS: dict[str, list[dict[str, Any] | None]] = {
    "default": [*_DRAINING, *(health(state, draining=True) for state in ("unloading", "unloaded"))],
    "passing": [*_DRAINING, None],
    "called-off": [*_DRAINING, health()],
    "endless": [health(busy=1, draining=True)],
}
RELOADS: dict[str, list[dict[str, Any] | None]] = {
    model: [health(last_reload=words) for words in story]
    for model, story in {
        "builtin:next": [
            "waiting for 1 task",
            "loading \x1bbuiltin:next",
            "loading \x1bbuiltin:next",
            "done: it serves",
        ],
        "builtin:broken": ["loading builtin:broken", "failed: the file is damaged; builtin:tiny serves"],
        "builtin:forgotten": ["loading builtin:forgotten", None],
        "builtin:endless": ["loading builtin:endless"],
    }.items()
}


@dataclass
class Task:
    request: dict[str, Any]
    canceled: threading.Event = field(default_factory=threading.Event)
    cuts: int = 0


@dataclass
class Refusal:
    status: int
    body: dict[str, Any]
    headers: dict[str, str] = field(default_factory=dict)


CUT_OFF = Refusal(0, {})  # the connection breaks instead of an answer


@dataclass(frozen=True)
class Seen:
    method: str
    path: str
    headers: dict[str, str]
    body: Any


class ContractService:
    """`refusals` are answered, one a request, before anything else; `seen` is every request."""

    def __init__(self, token: str = "t" * 22) -> None:
        self.token = token
        self.tasks: dict[str, Task] = {}
        self.sessions = {SESSION_ID: dict(SESSION)}
        self.healths: dict[str, list[dict[str, Any] | None]] = {pool: [HEALTH] for pool in DRAINS}
        self.catalog = SmallCatalog()
        self.refusals: list[Refusal] = []
        self.seen: list[Seen] = []
        self.submission_came = threading.Event()
        self.cancel_missed = threading.Event()
        self.looked = threading.Event()  # at a pool's health
        self._server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"service": self}))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> ContractService:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for task in list(self.tasks.values()):
            task.canceled.set()
        self.cancel_missed.set()
        self._server.shutdown()
        self._server.server_close()

    def only_task(self) -> Task:
        (task,) = self.tasks.values()
        return task

    def headers_of(self, path_end: str) -> list[dict[str, str]]:
        return [seen.headers for seen in self.seen if seen.path.endswith(path_end)]


class _Server(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """A client that went away is what some tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    service: ContractService

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._handle("GET")

    def do_POST(self) -> None:
        self._handle("POST")

    def do_DELETE(self) -> None:
        self._handle("DELETE")

    def _handle(self, method: str) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = json.loads(content) if content else None
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.service.seen.append(Seen(method, self.path, headers, body))
        parts = urlsplit(self.path)
        if parts.path == "/healthz":
            return self._json(200, {"status": "ok"})
        if headers.get("authorization") != f"Bearer {self.service.token}":
            return self._json(401, error("UNAUTHORIZED"))
        if self.service.refusals:
            refusal = self.service.refusals.pop(0)
            if refusal is CUT_OFF:
                self.close_connection = True
                return
            return self._json(refusal.status, refusal.body, refusal.headers)
        try:
            self._route(method, [part for part in parts.path.split("/") if part][1:], parse_qs(parts.query), body)
        except KeyError:
            self._json(404, error("NOT_FOUND"))

    def _route(self, method: str, path: list[str], query: dict[str, list[str]], body: Any) -> None:
        match method, path:
            case "POST", ["tasks"]:
                self._submit(body)
            case "GET", ["tasks"]:
                items = [self._task_status(id) for id in reversed(self.service.tasks)]
                limit = int(query.get("limit", ["50"])[0])
                self._json(200, {"items": items[:limit], "next_cursor": "more" if items[limit:] else None})
            case "GET", ["tasks", id]:
                self._json(200, self._task_status(id))
            case "GET", ["tasks", id, "stream"]:
                self._stream(id, self.service.tasks[id])
            case "POST", ["tasks", id, "cancel"]:
                self._cancel(id)
            case "GET", ["pools"]:
                self._json(200, {"items": [POOL, PASSING_POOL], "next_cursor": None})
            case "GET", ["pools", "default"]:
                self._json(200, POOL)
            case "GET", ["pools", id, "health"]:
                self._look(self.service.healths[id])
            case "POST", ["pools", id, "drain"]:
                self._begin(id, DRAINS[id])
            case "POST", ["pools", id, "reload"]:
                self._begin(id, RELOADS[body["new_model_ref"]], is_exclusive=True)
            case "GET", ["sessions", id]:
                self._json(200, self.service.sessions[id])
            case "DELETE", ["sessions", id]:
                self.service.sessions.pop(id, None)
                self._nothing()
            case _, ["catalog", "models", *rest]:
                status, answer = self.service.catalog.answer(method, rest, body)
                if answer is None:
                    return self._nothing()
                self._json(status, answer)
            case "GET", ["capabilities"]:
                self._json(200, CAPABILITIES)
            case _:
                raise KeyError(path)

    def _submit(self, body: dict[str, Any]) -> None:
        task = Task(body)
        if body.get("prompt") == "late-submission":  # the cancellation overtakes it
            self.service.submission_came.set()
            self.service.cancel_missed.wait()
        self.service.tasks[body["task_id"]] = task
        self.service.submission_came.set()
        admission = {"task_id": body["task_id"], "queue_position": 0, "predicted_start_ms": None}
        self._json(202, admission | {"backoff_ms": 0, "pool_id": "default", "seed": body.get("seed") or 7})

    def _cancel(self, id: str) -> None:
        if id not in self.service.tasks:
            self._json(404, error("NOT_FOUND"))
            self.service.cancel_missed.set()
            return
        self.service.tasks[id].canceled.set()
        self._nothing()

    def _begin(self, pool_id: str, story: list[dict[str, Any] | None], *, is_exclusive: bool = False) -> None:
        now = self.service.healths[pool_id][0]
        assert now is not None
        if is_exclusive and str(now["last_reload"]).startswith(("loading", "waiting")):
            return self._json(409, error("CONFLICT"))
        self.service.healths[pool_id] = list(story)
        self._json(202, story[0] or HEALTH)

    def _look(self, healths: list[dict[str, Any] | None]) -> None:
        if len(healths) > 1:
            healths.pop(0)
        self.service.looked.set()
        if healths[0] is None:
            return self._json(404, error("NOT_FOUND"))
        self._json(200, healths[0])

    def _task_status(self, id: str) -> dict[str, Any]:
        task = self.service.tasks[id]
        empty = ("session_id", "replica_id", "queue_position", "predicted_start_ms", "started_at", "ended_at")
        return dict.fromkeys((*empty, "placement", "error", "text")) | {
            "task_id": id,
            "state": "canceled" if task.canceled.is_set() else "running",
            "priority": "interactive",
            "engine": "simulated",
            "pool_id": "default",
            "created_at": "2026-01-01T12:00:00.000Z",
            "tokens_in": 1,
            "tokens_out": 2,
            "seed": 7,
            "text": "an\x1b[2Jswer",
        }

    def _stream(self, id: str, task: Task) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        after = int(self.headers.get("Last-Event-ID", 0))
        for number, (event, data) in enumerate(self._frames(id, task), 1):
            if number <= after:
                continue
            self.wfile.write(b": alive\n")
            self.wfile.write(f"id: {number}\nevent: {event}\ndata: {json.dumps(data)}\n\n".encode())

    def _frames(self, id: str, task: Task) -> Iterator[tuple[str, Any]]:
        prompt = task.request.get("prompt") or task.request["messages"][0]["content"]
        yield "started", {"task_id": id, "queue_position": 0, "predicted_start_ms": None}
        for event, data in _SCRIPTS[prompt]:
            if event == "hold":
                task.canceled.wait()
            if task.canceled.is_set():
                yield "error", error("CANCELED")
                return
            if event == "cut":
                task.cuts += 1
                if task.cuts == 1 or data == "always":
                    self.wfile.write(b'id: 99\nevent: token\ndata: {"t":"never whole"')
                    return
            elif event != "hold":
                yield event, data

    def _nothing(self) -> None:
        self.send_response(204)
        self.end_headers()

    def _json(self, status: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


def main() -> None:
    """Serve until stdin ends; say where. The home folder's token is the token."""
    import os
    from pathlib import Path

    home = Path(os.environ["LLORCH_HOME"])
    if os.environ.get("FAKE_FAILS"):
        sys.exit("the card is on fire")
    with ContractService((home / "token").read_text().strip()) as service:
        (home / "server.pid").write_text(str(os.getpid()))
        print(f"listening on {service.url}", flush=True)
        sys.stdin.read()
        canceled = [task.canceled.is_set() for task in service.tasks.values()]
        (home / "server.ended").write_text(json.dumps(canceled))


if __name__ == "__main__":
    main()
