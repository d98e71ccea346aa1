"""Sessions on real engines: what is read again of a conversation, and what its turns may use."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.live.client import ENGINES, descendants, finish, kill, open_client, submit, until
from tests.live_service import LiveService, live_service

pytestmark = pytest.mark.xdist_group("live sessions")

STORY = "Once upon a time there was a little fox who lived in the wood and had a friend. "
POOLS = [
    {"id": "llamacpp", "slots": 2},
    {"id": "ctransformers", "engine": "ctransformers"},
    {"id": "pair", "replicas": 2, "slots": 1},
]


@pytest.fixture(scope="module")
def service() -> Iterator[LiveService]:
    with live_service({"pools": POOLS[:2], "sessions": {"max_turns": 4}}) as running:
        with open_client(running) as client:
            until(lambda: all(pool["ready"] for pool in client.get("/v1/pools").json()["items"]))
        yield running


@pytest.fixture
def client(service: LiveService) -> Iterator[httpx.Client]:
    with open_client(service) as client:
        yield client


def a_story(name: str) -> str:
    """A long prompt that no other session begins with: what the engine holds of another one would serve as well."""
    return f"{name}: " + STORY * 12


def session(client: httpx.Client, session_id: str) -> dict[str, Any]:
    answer = client.get(f"/v1/sessions/{session_id}")
    assert answer.status_code == 200, answer.text
    info: dict[str, Any] = answer.json()
    return info


def last(client: httpx.Client, **body: Any) -> dict[str, Any]:
    """The `end` frame of a task, and its text as `text`."""
    frames = finish(client, **body)
    assert frames[-1].event == "end", frames[-1]
    text = "".join(frame.data["t"] for frame in frames if frame.event == "token")
    return {**frames[-1].data, "text": text}


@pytest.mark.spec("HP-DET-1", "HP-SES-1", "HP-SES-3")
@pytest.mark.parametrize("determinism", ["strict", "best_effort"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_conversation_keeps_its_kv_and_a_strict_one_its_bytes(
    client: httpx.Client, engine: str, determinism: str
) -> None:
    """Three turns, each with the history before it: from the second on the prompt is warm. Said cold afterwards, a
    strict turn has the very same bytes."""
    session_id, turns = str(uuid.uuid4()), []
    history = a_story(session_id)
    for turn in range(3):
        asked = {"engine": engine, "prompt": history, "seed": turn, "max_tokens": 24, "determinism": determinism}
        end = last(client, session_id=session_id, **asked)
        assert end["kv_warmth"] is (turn > 0)
        turns.append((asked, end["text"]))
        history += end["text"] + STORY * 2
        info = session(client, session_id)
        assert (info["turns"], info["kv_warmth"]) == (turn + 1, True)
        assert info["kv_bytes"] > 0
    for asked, text in turns if determinism == "strict" else []:
        again = last(client, **asked)
        assert (again["kv_warmth"], again["text"]) == (False, text)


@pytest.mark.spec("HP-SES-1")
@pytest.mark.parametrize("engine", ENGINES)
def test_a_deleted_session_is_gone_from_the_engine(client: httpx.Client, engine: str) -> None:
    """After the answer to DELETE: the next turn, in a session of the same id, is read from its first token."""
    session_id = str(uuid.uuid4())
    asked = {"engine": engine, "prompt": a_story(session_id), "session_id": session_id, "max_tokens": 8}
    assert not last(client, **asked)["kv_warmth"]
    assert last(client, **asked)["kv_warmth"]
    assert client.delete(f"/v1/sessions/{session_id}").status_code == 204
    assert client.get(f"/v1/sessions/{session_id}").status_code == 404
    assert client.delete(f"/v1/sessions/{session_id}").status_code == 204
    assert not last(client, **asked)["kv_warmth"]
    assert session(client, session_id.upper())["turns"] == 1


@pytest.mark.spec("HP-SES-2")
def test_a_session_has_its_turns_and_no_more(client: httpx.Client) -> None:
    """The fifth of four is told that it has ended; DELETE lets the id begin anew."""
    session_id = str(uuid.uuid4())
    for _ in range(4):
        last(client, session_id=session_id, max_tokens=1)
    assert session(client, session_id)["kv_warmth"] is False
    body = {"model_ref": "builtin:tiny", "prompt": "Once", "session_id": session_id}
    refused = client.post("/v1/tasks", json=body)
    assert (refused.status_code, refused.json()["code"]) == (409, "SESSION_EXPIRED")
    assert client.delete(f"/v1/sessions/{session_id}").status_code == 204
    last(client, session_id=session_id, max_tokens=1)


@pytest.mark.spec("HP-SES-3")
def test_a_cold_hint_reads_everything(client: httpx.Client) -> None:
    """`kv_hint: cold` in a warm session."""
    session_id = str(uuid.uuid4())
    asked = {"prompt": a_story(session_id), "session_id": session_id, "max_tokens": 4}
    assert not last(client, **asked)["kv_warmth"]
    assert not last(client, kv_hint="cold", **asked)["kv_warmth"]


@pytest.mark.spec("HP-SES-3", "HP-OBS-2")
def test_a_session_whose_worker_is_lost_goes_on_cold() -> None:
    """Where there is a worker, and says so; the part of the context that sessions hold is in the metrics."""
    with live_service({"pools": POOLS[2:]}) as service, open_client(service) as client:
        until(lambda: client.get("/v1/pools/pair").json()["slots_total"] == 2)
        session_id = str(uuid.uuid4())
        asked = {"prompt": a_story(session_id), "session_id": session_id, "max_tokens": 4}
        first = submit(client, **asked)
        until(lambda: client.get(f"/v1/tasks/{first['task_id']}").json()["state"] == "succeeded")
        assert last(client, **asked)["kv_warmth"]
        shares = _kv_shares(client)
        assert sorted(share > 0 for share in shares.values()) == [False, True]
        for pid in descendants(service.pid):  # one of them has it
            if session(client, session_id)["kv_warmth"]:
                kill(pid)
                until(lambda: lost(client) or not session(client, session_id)["kv_warmth"])
        until(lambda: not session(client, session_id)["kv_warmth"])
        assert session(client, session_id)["kv_bytes"] == 0
        assert not last(client, **asked)["kv_warmth"]
        assert session(client, session_id)["turns"] == 3


def lost(client: httpx.Client) -> bool:
    """Whether one of the pool's workers is not there."""
    return any(one["state"] != "ready" for one in client.get("/v1/pools/pair/health").json()["replicas"])


def _kv_shares(client: httpx.Client) -> dict[str, float]:
    lines = [line for line in client.get("/metrics").text.splitlines() if line.startswith("kv_cache_usage_ratio{")]
    return {line.split('replica_id="')[1].split('"')[0]: float(line.rsplit(" ", 1)[1]) for line in lines}


@pytest.mark.spec("HP-SES-4", "HP-STR-3", "HP-STR-4", "HP-ADM-7", "HP-ERR-2")
def test_headers_frames_session_and_refusal_agree() -> None:
    """What is left is told alike everywhere, and what is more than that is refused before it is queued."""
    budgets = {"mode": "enforce", "tokens": 200, "time_ms": 600_000, "cost": 1.0, "cost_per_1k_tokens": 0.5}
    with live_service({"sessions": {"budgets": budgets}}) as service, open_client(service) as client:
        until(lambda: client.get("/v1/pools/default").json()["ready"])
        session_id = str(uuid.uuid4())
        body = {"model_ref": "builtin:tiny", "prompt": "Once upon a time", "session_id": session_id, "max_tokens": 40}
        admitted = client.post("/v1/tasks", json=body)
        assert (admitted.status_code, admitted.headers["X-Budget-Tokens-Remaining"]) == (202, "155")
        with client.stream("GET", f"/v1/tasks/{admitted.json()['task_id']}/stream") as answer:
            assert int(answer.headers["X-Budget-Tokens-Remaining"]) >= 155
            frames = answer.read().decode()
        info = session(client, session_id)
        used = 200 - info["tokens_budget_remaining"]
        assert 5 < used <= 45
        assert info["cost_budget_remaining"] == pytest.approx(1 - used * 0.0005)
        assert 0 < info["time_budget_remaining_ms"] < 600_000
        shown = f'"tokens_budget_remaining":{200 - used},"time_budget_remaining_ms":{info["time_budget_remaining_ms"]},'
        assert shown in frames.split("event: metrics")[-1]
        refused = client.post("/v1/tasks", json=body | {"max_tokens": 300})
        assert (refused.status_code, refused.json()["code"]) == (429, "BUDGET_EXHAUSTED")
        assert refused.json()["policy_label"] == "budget"
        assert refused.json()["retriable"] is False
        assert refused.headers["X-Budget-Tokens-Remaining"] == str(200 - used)
        assert int(refused.headers["X-Backoff-Ms"]) == refused.json()["retry_after_ms"]
        assert session(client, session_id)["tokens_budget_remaining"] == 200 - used
        assert "X-Budget-Tokens-Remaining" not in client.post("/v1/tasks", json=body | {"session_id": None}).headers
