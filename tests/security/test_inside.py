"""What lies behind the door: workers, files, output, load, races."""

from __future__ import annotations

import re
import socket
import stat
import tomllib
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.live.client import descendants, finish, stream, until
from tests.live_service import LiveService

from .classes import CLASSES
from .conftest import HOSTILE_ENVIRONMENT, LIMIT_S

pytestmark = [pytest.mark.xdist_group("security"), pytest.mark.spec("HP-SEC-7")]

ROOT = Path(__file__).resolve().parents[2]


def workers(service: LiveService) -> Iterator[Path]:
    """Their folders in /proc."""
    found = [Path(f"/proc/{pid}") for pid in descendants(service.pid)]
    assert found
    yield from found


@pytest.mark.attack(7)
@pytest.mark.spec("HP-SEC-1")
def test_a_worker_inherits_nothing_that_steers_it(service: LiveService) -> None:
    """No LLAMA_ARG_…, no proxy, no token of ours or of anybody; it is in no port's list; what it makes is its own."""
    for process in workers(service):
        environment = (process / "environ").read_bytes().decode(errors="replace").split("\0")
        names = {entry.partition("=")[0] for entry in environment}
        assert not names & (HOSTILE_ENVIRONMENT.keys() | {"LLORCH_API_TOKEN", "LD_PRELOAD"})
        for secret in (service.token, "hf_secret_of_the_user", "stolen"):
            assert secret not in "".join(environment)
            assert secret.encode() not in (process / "cmdline").read_bytes()
        (umask,) = re.findall(r"^Umask:\s+(\d+)$", (process / "status").read_text(), re.MULTILINE)
        assert umask == "0077"


@pytest.mark.attack(1)
@pytest.mark.attack(16)
def test_the_token_is_nowhere_but_in_its_file(service: LiveService, client: httpx.Client) -> None:
    """Not on a command line, in the log, in the metrics, in an answer; what the home has is its user's alone."""
    for process in [Path(f"/proc/{service.pid}"), *workers(service)]:
        assert service.token.encode() not in (process / "cmdline").read_bytes()
    shown = [
        client.get(path).text
        for path in ("/metrics", "/v1/capabilities", "/v1/pools", "/v1/tasks", "/openapi/data.json")
    ]
    assert service.token not in "".join(shown)
    assert service.token not in service.log_path.read_text()
    assert stat.S_IMODE(service.home.stat().st_mode) == 0o700
    for path in service.home.rglob("*"):
        if path.is_file():
            assert not path.stat().st_mode & 0o077, path
            assert path.name == "token" or service.token.encode() not in path.read_bytes()


@pytest.mark.attack(12)
@pytest.mark.spec("HP-STR-5")
@pytest.mark.parametrize(
    "text",
    [
        "\n\nevent: end\ndata: {}\n\n",
        "\x1b]0;evil\x07\x1b[2J",
        "<script>alert(1)</script>",
        "\u202e\u0000\ufeff",
        "}" * 500,
    ],
)
def test_what_an_engine_may_say_stays_inside_its_frame(client: httpx.Client, text: str) -> None:
    """A prompt that asks for it, in strict frames: the parser of the tests takes only whole events of whole JSON."""
    frames = finish(client, prompt=text + "Once", max_tokens=16, determinism="best_effort")
    assert [frame.event for frame in frames].count("end") == 1
    assert frames[-1].event == "end"


@pytest.mark.attack(11)
@pytest.mark.spec("HP-ADM-1", "HP-STR-7", "HP-ERR-2")
def test_a_flood_is_told_to_wait_and_ends(client: httpx.Client, service: LiveService) -> None:
    """More tasks than places, more streams than there may be: 429 and 503 with a wait, and room again afterwards."""
    body = {"model_ref": "builtin:tiny", "prompt": "Once upon a time", "max_tokens": 400}
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: client.post("/v1/tasks", json=body), range(40)))
    statuses = {answer.status_code for answer in answers}
    assert statuses == {202, 429}
    assert all(int(answer.headers["Retry-After"]) >= 1 for answer in answers if answer.status_code == 429)
    admitted = [answer.json()["task_id"] for answer in answers if answer.status_code == 202]
    with ExitStack() as stack:
        opened = [
            stack.enter_context(client.stream("GET", f"/v1/tasks/{admitted[-1]}/stream")).status_code for _ in range(9)
        ]
    assert opened.count(503) >= 1 or client.get(f"/v1/tasks/{admitted[-1]}").json()["state"] == "succeeded"
    for task_id in admitted:
        client.post(f"/v1/tasks/{task_id}/cancel")
    until(lambda: "streams_open 0.0" in client.get("/metrics").text)
    assert finish(client, max_tokens=2)[-1].event == "end"


@pytest.mark.attack(11)
def test_connections_that_say_nothing_keep_nobody_out(client: httpx.Client, service: LiveService) -> None:
    """A hundred of them, and half a request on each."""
    address = urlsplit(service.url)
    with ExitStack() as stack:
        for _ in range(100):
            connection = stack.enter_context(socket.create_connection((address.hostname, address.port), LIMIT_S))
            connection.sendall(b"POST /v1/tasks HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n")
        assert client.get("/v1/pools").status_code == 200
        assert finish(client, max_tokens=2)[-1].event == "end"


@pytest.mark.attack(13)
@pytest.mark.spec("HP-ADM-8")
def test_one_id_sent_at_once_is_one_task(client: httpx.Client) -> None:
    """Thirty times the same body: one run. With other bodies among them: 409 for those that came too late."""
    task_id = str(uuid.uuid4())
    body = {"model_ref": "builtin:tiny", "prompt": "Once", "task_id": task_id, "max_tokens": 4}
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda n: client.post("/v1/tasks", json=body | {"seed": n % 2}), range(30)))
    seeds = {answer.json()["seed"] for answer in answers if answer.status_code == 202}
    assert len(seeds) == 1
    assert {answer.status_code for answer in answers} <= {202, 409}
    assert [frame.event for frame in stream(client, task_id)].count("end") == 1


@pytest.mark.attack(13)
@pytest.mark.spec("HP-STR-6", "HP-SES-1")
def test_ends_that_cross_leave_nothing(client: httpx.Client) -> None:
    """Submissions, cancels and deletes of one session, all at once; afterwards nothing runs and nothing is held."""
    session_id, ids = str(uuid.uuid4()), [str(uuid.uuid4()) for _ in range(24)]

    def act(number: int) -> None:
        task_id = ids[number // 3]
        told: dict[str, Any] = {
            "model_ref": "builtin:tiny",
            "prompt": "Once",
            "task_id": task_id,
            "session_id": session_id,
        }
        match number % 3:
            case 0:
                client.post("/v1/tasks", json=told | {"max_tokens": 50})
            case 1:
                client.post(f"/v1/tasks/{task_id}/cancel")
            case _:
                client.delete(f"/v1/sessions/{session_id}")

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(act, range(72)))
    client.delete(f"/v1/sessions/{session_id}")
    until(lambda: client.get("/v1/pools/default/health").json()["replicas"][0]["slots_busy"] == 0)
    assert finish(client, max_tokens=2)[-1].event == "end"


@pytest.mark.attack(18)
def test_every_dependency_is_bounded() -> None:
    """A release of tomorrow is not installed unseen."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    wanted = [one for one in wanted if not one.startswith("llama-orch[")]
    assert [one for one in wanted if "<" not in one and "==" not in one and "~=" not in one] == []


def test_every_class_of_attacks_has_a_test() -> None:
    """By its mark, wherever it is."""
    files = [path for path in (ROOT / "tests").rglob("test_*.py") if ".venv" not in path.parts]
    marked = {int(number) for path in files for number in re.findall(r"mark\.attack\((\d+)\)", path.read_text())}
    assert marked == CLASSES.keys(), {number: CLASSES[number] for number in CLASSES.keys() - marked}
