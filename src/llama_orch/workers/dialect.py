"""llama-server's HTTP dialect, as far as the service speaks it, in front of a model that decodes one sequence.

A threaded standard-library server on a Unix socket. There is one slot: a second completion waits for the first.
A completion looks between prefill chunks and between tokens whether its client is still there; a closed connection is
how it is canceled.
"""

from __future__ import annotations

import codecs
import hmac
import json
import select
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingMixIn, UnixStreamServer
from typing import Any, Protocol

from llama_orch.workers.stop_strings import StopStrings

_BODY_BYTES_MAX = 64 << 20
_BACKLOG = 128

Body = dict[str, Any]


class Refused(Exception):
    """The request cannot be served; the text goes to the client."""

    def __init__(self, message: str, code: int = 400, kind: str = "invalid_request_error") -> None:
        super().__init__(message)
        self.code = code
        self.kind = kind


class Model(Protocol):
    """What the dialect needs of a model. Its methods may be called from several threads."""

    n_ctx: int
    build_info: str

    def tokenize(self, text: str, add_special: bool) -> list[int]: ...
    def piece(self, token: int) -> bytes: ...
    def is_token(self, token: object) -> bool: ...
    def is_end(self, token: int) -> bool: ...
    def reuse(self, tokens: list[int], is_exact: bool) -> int:
        """Keep what the slot holds of these tokens' beginning; how many those are, never all of them. `is_exact`: only
        what was evaluated as it would be from the first token."""

    def erase(self) -> int: ...
    def prefill(self, tokens: list[int]) -> Iterator[int]:
        """Evaluate in chunks; yields how many tokens are done after each."""

    def sample(self, body: Body, index: int) -> int:
        """The token at this index of the answer."""

    def push(self, token: int) -> bool:
        """Take a sampled token into the context; False when the context is full."""

    def apply_template(self, messages: list[dict[str, str]]) -> str: ...
    def vector(self) -> list[float]:
        """What the last token that was evaluated stands for, scaled to length 1."""


@dataclass
class _Run:
    """One completion: what its last event reports."""

    tokens_in: int
    cached: int = 0
    tokens_out: int = 0
    stop_type: str = "limit"
    started_at: float = field(default_factory=time.perf_counter)
    decoding_at: float = 0.0

    def last_event(self, text: str) -> Body:
        now = time.perf_counter()
        timings = {
            "cache_n": self.cached,
            "prompt_n": self.tokens_in - self.cached,
            "prompt_ms": (self.decoding_at - self.started_at) * 1000,
            "predicted_n": self.tokens_out,
            "predicted_ms": (now - self.decoding_at) * 1000,
        }
        return self.event(text) | {"stop": True, "stop_type": self.stop_type, "timings": timings}

    def event(self, text: str) -> Body:
        counts = {"tokens_predicted": self.tokens_out, "tokens_evaluated": self.tokens_in}
        return {"index": 0, "content": text, "stop": False, "id_slot": 0, **counts}


class Dialect:
    """The routes, without HTTP: bodies in, bodies or events out."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._slot = threading.Lock()

    def answer(self, route: tuple[str, str], body: Body) -> object:
        """The answer of every route but /completion."""
        model = self._model
        match route:
            case ("GET", "/props"):
                settings = {"n_ctx": model.n_ctx}
                return {"total_slots": 1, "default_generation_settings": settings, "build_info": model.build_info}
            case ("GET", "/slots"):
                return [{"id": 0, "n_ctx": model.n_ctx, "is_processing": self._slot.locked()}]
            case ("POST", "/tokenize"):
                return {"tokens": model.tokenize(_string(body, "content"), bool(body.get("add_special", False)))}
            case ("POST", "/detokenize"):
                pieces = (model.piece(token) for token in self._checked(body.get("tokens")))
                return {"content": b"".join(pieces).decode(errors="replace")}
            case ("POST", "/apply-template"):
                return {"prompt": model.apply_template(body.get("messages", []))}
            case ("POST", "/v1/embeddings"):
                return self._embed(_string(body, "input"))
            case ("POST", "/slots/0?action=erase"):
                with self._slot:
                    return {"id_slot": 0, "n_erased": model.erase()}
        raise Refused("File Not Found", 404, "not_found_error")

    def _embed(self, text: str) -> Body:
        tokens = self._model.tokenize(text, add_special=True)
        self._check_length(tokens)
        with self._slot:
            self._model.erase()
            for _ in self._model.prefill(tokens):
                pass
            vector = self._model.vector()
            self._model.erase()
        return {"data": [{"index": 0, "embedding": vector}], "usage": {"prompt_tokens": len(tokens)}}

    def _check_length(self, tokens: list[int]) -> None:
        if len(tokens) >= self._model.n_ctx:
            raise Refused(
                f"request ({len(tokens)} tokens) exceeds the available context size ({self._model.n_ctx} tokens)",
                kind="exceed_context_size_error",
            )

    def complete(self, body: Body, is_gone: Callable[[], bool]) -> Generator[Body, None, None]:
        """A completion's events, the last with `stop`. Ends early, without one, when the client has gone."""
        prompt = body.get("prompt")
        tokens = self._checked(prompt) if isinstance(prompt, list) else None
        with self._slot:
            tokens = tokens or self._model.tokenize(_string(body, "prompt"), add_special=True)
            self._check_length(tokens)
            run = _Run(tokens_in=len(tokens))
            for done in self._prefill(tokens, run, body):
                if is_gone():
                    return
                if body.get("return_progress"):
                    progress = {"total": len(tokens), "cache": run.cached, "processed": done}
                    yield run.event("") | {"prompt_progress": progress}
            run.decoding_at = time.perf_counter()
            yield from self._decode(body, run, is_gone)

    def _prefill(self, tokens: list[int], run: _Run, body: Body) -> Iterator[int]:
        if body.get("cache_prompt", True):
            run.cached = self._model.reuse(tokens, bool(body.get("cache_exact", False)))
        else:
            self._model.erase()
        yield run.cached
        for done in self._model.prefill(tokens[run.cached :]):
            yield run.cached + done

    def _decode(self, body: Body, run: _Run, is_gone: Callable[[], bool]) -> Iterator[Body]:
        limit = int(body.get("n_predict", 256))
        stops = StopStrings(body.get("stop", ()))
        characters = codecs.getincrementaldecoder("utf-8")("replace")
        while run.tokens_out < limit:
            if is_gone():
                return
            token = self._model.sample(body, run.tokens_out)
            run.tokens_out += 1
            if self._model.is_end(token):
                run.stop_type = "eos"
                break
            text = stops.feed(characters.decode(self._model.piece(token)))
            if stops.has_matched:
                run.stop_type = "word"
                yield run.last_event(text)
                return
            if text:
                yield run.event(text)
            if not self._model.push(token):
                break
        tail = stops.feed(characters.decode(b"", True))
        yield run.last_event(tail if stops.has_matched else tail + stops.flush())

    def _checked(self, tokens: object) -> list[int]:
        if not isinstance(tokens, list) or not all(self._model.is_token(token) for token in tokens):
            raise Refused("Prompt contains invalid tokens")
        return tokens


class _Server(ThreadingMixIn, UnixStreamServer):
    daemon_threads = True
    request_queue_size = _BACKLOG

    def __init__(self, socket_path: str, api_key: str, dialect: Dialect) -> None:
        self.key_header = f"Bearer {api_key}".encode()
        self.dialect = dialect
        super().__init__(socket_path, _Handler)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        self._serve("GET")

    def do_POST(self) -> None:
        self._serve("POST")

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: the service logs what it asks."""

    def address_string(self) -> str:
        return "unix"

    def _serve(self, method: str) -> None:
        self.close_connection = True
        try:
            if (method, self.path) == ("GET", "/health"):
                return self._send(200, {"status": "ok"})
            self._authenticate()
            body = self._read_body()
            if (method, self.path) == ("POST", "/completion"):
                return self._stream(self.server.dialect.complete(body, self._is_gone))
            self._send(200, self.server.dialect.answer((method, self.path), body))
        except Refused as refused:
            self._send(refused.code, _fault(refused.code, str(refused), refused.kind))
        except (BrokenPipeError, ConnectionResetError):
            return None

    def _authenticate(self) -> None:
        given = self.headers.get("Authorization", "").encode("latin-1")
        if not hmac.compare_digest(given, self.server.key_header):
            raise Refused("Invalid API Key", 401, "authentication_error")

    def _read_body(self) -> Body:
        try:
            length = int(self.headers.get("Content-Length", "0"))
            if not 0 <= length <= _BODY_BYTES_MAX:
                raise Refused("the body is too large", 413)
            body = json.loads(self.rfile.read(length)) if length else {}
        except ValueError as error:
            raise Refused("the body is not JSON") from error
        if not isinstance(body, dict):
            raise Refused("the body is not a JSON object")
        return body

    def _stream(self, events: Generator[Body, None, None]) -> None:
        """Send events as they come. The head waits for the first one, so that a refusal still has its HTTP status."""
        # Closed here, not by the collector: the slot's lock is held until then.
        with closing(events):
            first = next(events, None)
            if first is None:
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self._send_event(first)
            for event in events:
                self._send_event(event)
        self.wfile.write(b"0\r\n\r\n")

    def _send_event(self, event: Body) -> None:
        data = b"data: " + json.dumps(event, separators=(",", ":")).encode() + b"\n\n"
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))

    def _send(self, code: int, body: object) -> None:
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Connection", "close")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _is_gone(self) -> bool:
        readable, _, _ = select.select([self.connection], [], [], 0)
        return bool(readable) and self.connection.recv(1, socket.MSG_PEEK) == b""


def serve(socket_path: str, api_key: str, model: Model) -> object:
    """Serve the model from threads; returns what must stay alive."""
    server = _Server(socket_path, api_key, Dialect(model))
    threading.Thread(target=server.serve_forever, name="dialect", daemon=True).start()
    return server


def _string(body: Body, name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str):
        raise Refused(f"'{name}' must be a string")
    return value


def _fault(code: int, message: str, kind: str) -> Body:
    return {"error": {"code": code, "message": message, "type": kind}}
