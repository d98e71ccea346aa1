"""What is sent: identifiers, references, bodies, headers."""

from __future__ import annotations

import gzip
import json
import os
import struct
from pathlib import Path

import httpx
import pytest

from tests.live.client import finish, until
from tests.live_service import LiveService

from .conftest import Say

pytestmark = [pytest.mark.xdist_group("security"), pytest.mark.spec("HP-SEC-2", "HP-ERR-1")]

CLIMBERS = [
    "..%2f..%2fetc%2fpasswd", "%2e%2e/%2e%2e/etc/passwd", "..\\..\\etc", "....//....//etc", "%00", "a%00b",
    "\u2025/\u2025/etc", "C:%5cWindows", "~root", "default%0d%0aX-Evil:1", "-rf", "A" * 3000,
]  # fmt: skip
PATHS = [
    "/v1/tasks/{}",
    "/v1/tasks/{}/stream",
    "/v1/sessions/{}",
    "/v1/pools/{}",
    "/v1/pools/{}/health",
    "/openapi/{}.json",
]


@pytest.mark.attack(5)
@pytest.mark.parametrize("path", PATHS)
def test_identifiers_lead_nowhere(client: httpx.Client, path: str) -> None:
    """A 4xx of ours, whatever is climbed over, and nothing of the disk in it."""
    for climber in CLIMBERS:
        answer = client.get(path.format(climber))
        assert answer.status_code in (400, 404, 414), (climber, answer.status_code)
        assert "X-Evil" not in answer.headers
        assert "root:" not in answer.text


@pytest.mark.attack(5)
@pytest.mark.attack(6)
@pytest.mark.parametrize(
    "reference",
    [
        "file:/etc/passwd", "file:../../etc/passwd", "file:{models}/../../../../etc/passwd", "file:{models}/link.gguf",
        "file:{models}/loop.gguf", "file:{models}", "file:/proc/self/environ", "file:/dev/zero", "file://evil.example/x",
        "builtin:../../../../etc/passwd", "builtin:tiny.gguf", "builtin:\0", "sha256:../../etc", "/etc/passwd",
        "http://169.254.169.254/latest/meta-data/", "https://127.0.0.1:9/x.gguf", "hf:../../x/y", "ftp://x/y", "-m",
        "file:{models}/a\n--host 0.0.0.0",
    ],
)  # fmt: skip
def test_references_lead_to_models_only(client: httpx.Client, models: Path, reference: str) -> None:
    """Neither what is there nor what is not is told apart, no file is opened, no request is made."""
    secret = models.parent / "secret.gguf"
    secret.write_bytes(b"GGUF" + b"\0" * 64)
    for name, aim in (("link.gguf", secret), ("loop.gguf", models / "loop.gguf")):
        if not os.path.lexists(models / name):
            (models / name).symlink_to(aim)
    answer = client.post("/v1/tasks", json={"model_ref": reference.format(models=models), "prompt": "x"})
    assert answer.status_code in (400, 403, 404), answer.text
    assert "root:" not in answer.text
    assert str(secret) not in answer.text


def numbers(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}Q", *values)


HOSTILE_FILES = {
    "empty": b"",
    "no header": b"GGUF",
    "many tensors": b"GGUF" + struct.pack("<I", 3) + numbers(2**62, 1),
    "many pairs": b"GGUF" + struct.pack("<I", 3) + numbers(1, 2**62),
    "long key": b"GGUF" + struct.pack("<I", 3) + numbers(0, 1, 2**63 - 1) + b"a",
    "nested arrays": b"GGUF"
    + struct.pack("<I", 3)
    + numbers(0, 1, 1)
    + b"k"
    + (struct.pack("<I", 9) + numbers(1)) * 500,
    "html": b"<html>" * 1000,
}


@pytest.mark.attack(8)
@pytest.mark.parametrize("name", HOSTILE_FILES)
def test_a_hostile_model_file_harms_nobody(client: httpx.Client, models: Path, name: str) -> None:
    """The task is refused or ends in a typed error, soon; the model that serves goes on."""
    file = models / f"{name.replace(' ', '-')}.gguf"
    file.write_bytes(HOSTILE_FILES[name])
    answer = client.post("/v1/tasks", json={"model_ref": f"file:{file}", "prompt": "x", "max_tokens": 2})
    if answer.status_code == 202:
        task_id = answer.json()["task_id"]
        until(lambda: client.get(f"/v1/tasks/{task_id}").json()["state"] == "failed")
    else:
        assert answer.status_code in (400, 404, 503), answer.text
    assert finish(client, max_tokens=2)[-1].event == "end"


BODIES = {
    "deep": b"[" * 200_000,
    "deep objects": b'{"a":' * 100_000,
    "nan": b'{"model_ref":"builtin:tiny","prompt":"x","sampling":{"temperature":NaN}}',
    "infinite": b'{"model_ref":"builtin:tiny","prompt":"x","sampling":{"temperature":1e999}}',
    "huge": b'{"model_ref":"builtin:tiny","prompt":"x","seed":' + b"9" * 5000 + b"}",
    "surrogate": b'{"model_ref":"builtin:tiny","prompt":"\\ud800"}',
    "not utf-8": b'{"model_ref":"builtin:tiny","prompt":"\xff\xfe"}',
    "bom": b'\xef\xbb\xbf{"model_ref":"builtin:tiny","prompt":"x"}x',
    "array": b"[1,2,3]",
    "null": b"null",
    "negative": b'{"model_ref":"builtin:tiny","prompt":"x","max_tokens":-1}',
    "unknown": b'{"model_ref":"builtin:tiny","prompt":"x","n_discard":-1,"__proto__":{}}',
    "gzip": gzip.compress(b"0" * 10_000_000),
    "too long": b'{"prompt":"' + b"x" * (2 << 20) + b'"}',
}


@pytest.mark.attack(9)
@pytest.mark.parametrize("name", BODIES)
def test_a_hostile_body_is_refused(client: httpx.Client, name: str) -> None:
    """By a 4xx that names the problem, in our envelope."""
    answer = client.post("/v1/tasks", content=BODIES[name], headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 413), (name, answer.status_code)
    assert answer.json()["code"] in ("INVALID_PARAMS", "PAYLOAD_TOO_LARGE")


@pytest.mark.attack(10)
@pytest.mark.spec("HP-SEC-7", "HP-OBS-5")
def test_nothing_writes_lines_of_its_own_into_the_log(say: Say, client: httpx.Client, service: LiveService) -> None:
    """Line ends and escapes in names, prompts and headers; every line of the log stays one event of JSON."""
    evil = 'x"}\n{"level":"error","message":"forged"}\r\n\x1b[2J\u2028\u202e'
    client.post("/v1/tasks", json={"model_ref": evil, "prompt": evil, "engine": evil[:60]})
    client.get("/v1/tasks", params={"cursor": evil, evil: evil})
    head = (
        f"GET /v1/tasks HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {service.token}\r\nConnection: close\r\n"
    )
    for hostile in ("a" * 60_000, "\x1b[31m", "a\tb", "\x80\xff"):
        heard = say(f"{head}X-Correlation-Id: {hostile}\r\n\r\n".encode("latin-1"))
        given = [line for line in heard.split(b"\r\n") if line.lower().startswith(b"x-correlation-id:")]
        assert len(given) == 1
        assert len(given[0]) < 200
        assert hostile.encode("latin-1") not in given[0]
    for line in service.log_path.read_text().splitlines():
        assert isinstance(json.loads(line), dict)
        assert "\x1b" not in line
        assert "forged" not in json.loads(line).get("level", "")


@pytest.mark.attack(11)
@pytest.mark.spec("HP-OBS-6")
def test_names_that_clients_invent_become_no_labels(client: httpx.Client) -> None:
    """However many models, engines, sessions and tasks are named, the metrics have as many series as before."""
    before = len(client.get("/metrics").text.splitlines())
    for number in range(50):
        body = {"model_ref": f"builtin:none-{number}", "prompt": "x", "engine": f"engine-{number}"}
        assert client.post("/v1/tasks", json=body).status_code in (400, 404)
        client.get(f"/v1/pools/none-{number}")
    text = client.get("/metrics").text
    assert "none-" not in text
    assert "engine-1" not in text
    assert len(text.splitlines()) <= before + 4  # the refusals' own series


@pytest.mark.attack(14)
@pytest.mark.parametrize("stop", [["a" * 257], ["a"] * 17, [""], ["(a+)+$"]])
def test_stop_texts_are_texts(client: httpx.Client, stop: list[str]) -> None:
    """Bounded in number and length, and no expressions."""
    body = {"model_ref": "builtin:tiny", "prompt": "x", "max_tokens": 2, "sampling": {"stop": stop}}
    assert client.post("/v1/tasks", json=body).status_code == (202 if stop == ["(a+)+$"] else 400)
