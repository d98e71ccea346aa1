"""Who may come in: tokens, names, methods, and what a browser can be made to send."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from llama_orch.contract.operations import ALLOW
from tests.live_service import LiveService

from .conftest import Say

pytestmark = [pytest.mark.xdist_group("security"), pytest.mark.spec("HP-SEC-2", "HP-SEC-3", "HP-SEC-8")]

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT")
UUID = "3f2b8c1e-9d5a-4c57-8a43-0c7d5b1f2e90"
LIMIT_S = 60.0


def target(path: str) -> str:
    return path.replace("{id}", "default" if "/pools/" in path else UUID)


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


@pytest.mark.attack(2)
@pytest.mark.parametrize("path", ALLOW)
def test_no_route_opens_to_any_method_without_the_token(say: Say, path: str) -> None:
    """401, or 405 where the path has no such method: nothing acts, nothing tells. /healthz alone says that it lives."""
    for method in METHODS:
        heard = say(f"{method} {target(path)} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        expected = {200, 405} if path == "/healthz" else {400, 401, 404, 405}  # CONNECT is no request to a path
        assert status(heard) in expected, (method, path, heard[:200])


@pytest.mark.attack(1)
@pytest.mark.parametrize(
    "header",
    [
        "",
        "Authorization: Bearer\r\n",
        "Authorization: Bearer \r\n",
        "Authorization: Bearer wrong\r\n",
        "Authorization: Basic {token}\r\n",
        "Authorization: bearer{token}\r\n",
        "Authorization: Bearer {token}x\r\n",
        "Authorization: Bearer {token}\0\r\n",
        "Authorization: Bearer {half}\r\n",
        "Authorization: Bearer \xff\xfe\r\n",
        "Authorization: Bearer " + "a" * 20_000 + "\r\n",
        "Authorization: Bearer wrong\r\nAuthorization: Bearer {token}\r\n",
        "X-Api-Key: {token}\r\n",
        "Cookie: token={token}\r\n",
    ],
)
def test_only_the_whole_token_in_its_header_opens(say: Say, service: LiveService, header: str) -> None:
    """Two of them are no token either. The refusal repeats nothing of what was sent."""
    token = service.token
    sent = header.replace("{token}", token).replace("{half}", token[: len(token) // 2])
    heard = say(f"GET /v1/tasks HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{sent}\r\n".encode("latin-1"))
    assert status(heard) in (400, 401, 431), heard[:300]
    assert token[:8].encode() not in heard


@pytest.mark.attack(1)
@pytest.mark.parametrize("query", ["?token={token}", "?access_token={token}", "?Authorization=Bearer%20{token}"])
def test_a_token_in_the_query_opens_nothing(say: Say, service: LiveService, query: str) -> None:
    """It would be in histories and logs."""
    path = "/v1/pools" + query.replace("{token}", service.token)
    assert status(say(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())) == 401
    assert service.token not in service.log_path.read_text()


@pytest.mark.attack(3)
@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8080",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "0x7f.1",
        "",
        "[::ffff:1]",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "OPTIONS"])
def test_another_name_is_not_ours(say: Say, service: LiveService, host: str, method: str) -> None:
    """DNS rebinding: a page whose name leads here has the token of nobody, and no answer even with one."""
    heard = say(
        f"{method} /v1/sessions/{UUID} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {service.token}\r\n"
        "Connection: close\r\n\r\n".encode()
    )
    assert status(heard) in (400, 403), heard[:200]


@pytest.mark.attack(3)
@pytest.mark.parametrize("origin", ["null", "http://evil.example", "http://localhost:3000"])
def test_no_page_is_let_in(client: httpx.Client, origin: str) -> None:
    """No answer names an origin that may read it, and a preflight gets no permission."""
    told = {
        "Origin": origin,
        "Access-Control-Request-Method": "DELETE",
        "Access-Control-Request-Headers": "authorization",
    }
    for method, path in (("OPTIONS", "/v1/tasks"), ("GET", "/v1/tasks"), ("GET", "/healthz"), ("GET", "/ui/")):
        answer = client.request(method, path, headers=told)
        assert not [name for name in answer.headers if name.lower().startswith("access-control-")]


@pytest.mark.attack(3)
@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "text/json"]
)
def test_what_a_form_can_send_is_not_taken(client: httpx.Client, content_type: str) -> None:
    """A browser sends these to anybody without asking."""
    body = json.dumps({"model_ref": "builtin:tiny", "prompt": "x"}).encode()
    assert client.post("/v1/tasks", content=body, headers={"Content-Type": content_type}).status_code == 415


@pytest.mark.attack(4)
@pytest.mark.spec("HP-SEC-1")
@pytest.mark.parametrize("token", ["short", "a" * 64, "0000-1111-0000-1111"])
def test_a_weak_token_is_not_put_before_the_network(tmp_path: Path, token: str) -> None:
    """`serve` refuses before it binds, and does not show what it was given."""
    (tmp_path / "config.yaml").write_text("server: {host: 0.0.0.0}\n")
    env = {**os.environ, "LLORCH_HOME": str(tmp_path / "home"), "LLORCH_API_TOKEN": token}
    done = subprocess.run(
        [
            sys.executable,
            "-P",
            "-m",
            "llama_orch.cli",
            "serve",
            "--config",
            str(tmp_path / "config.yaml"),
            "--port",
            "0",
        ],
        env=env,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode != 0
    assert "listening" not in done.stdout + done.stderr
    assert token not in done.stdout + done.stderr
