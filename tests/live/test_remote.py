"""The service in front of servers elsewhere: llama.cpp's own, as it comes, and one that a test makes busy or breaks."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import pytest

from openai import OpenAI
from tests.engines.remote.upstream import Heard, Upstream, delta, fails, streams, tells, upstream_beside, usual
from tests.live.client import LIMIT_S, finish, live_frames, open_client, stream, submit, until
from tests.live.models import task
from tests.live.plain_server import ALIAS, KEY, PlainServer, plain_server
from tests.live_service import LiveService, live_service

pytestmark = pytest.mark.xdist_group("live-remote")

FAR, ODD = f"openai:box/{ALIAS}", "openai:odd/org/model"


@pytest.fixture(scope="module")
def box() -> Iterator[PlainServer]:
    with plain_server() as server:
        yield server


@pytest.fixture(scope="module")
def odd() -> Iterator[Upstream]:
    with upstream_beside() as upstream:
        yield upstream


def configuration(box_url: str, odd_url: str, key_file: Path) -> dict[str, Any]:
    quick = {"health_interval_ms": 200, "connect_timeout_ms": 2000}
    servers = [
        {"name": "box", "base_url": box_url, "api_key_file": str(key_file), **quick},
        {"name": "odd", "base_url": odd_url, "max_concurrency": 2, **quick},
    ]
    pools = [
        {"id": "far", "engine": "openai", "model": FAR},
        {"id": "odd", "engine": "openai", "model": ODD, "queue": {"capacity": 2}},
    ]
    return {"engines": {"openai": {"servers": servers}}, "pools": pools}


@pytest.fixture(scope="module")
def service(box: PlainServer, odd: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveService]:
    key_file = tmp_path_factory.mktemp("key") / "box.key"
    key_file.touch(mode=0o600)
    key_file.write_text(KEY + "\n")
    with live_service(configuration(f"{box.address}/v1", odd.url, key_file)) as running:
        with open_client(running) as client:
            until(lambda: is_ready(client, "far") and is_ready(client, "odd"))
        yield running


@pytest.fixture
def client(service: LiveService) -> Iterator[httpx.Client]:
    with open_client(service) as client:
        yield client


@pytest.fixture(autouse=True)
def sound_again(odd: Upstream) -> None:
    odd.answers.clear()
    odd.answers.update(usual())
    odd.heard.clear()


def is_ready(client: httpx.Client, pool: str) -> bool:
    return bool(client.get(f"/v1/pools/{pool}").json()["ready"])


@pytest.mark.spec("HP-REM-1", "HP-REM-6")
def test_a_server_is_a_replica(client: httpx.Client) -> None:
    """With the slots and the context that it told of, on no device, and without memory here."""
    pool = client.get("/v1/pools/far").json()
    assert (pool["engine"], pool["model"], pool["model_digest"]) == ("openai", FAR, None)
    assert (pool["ctx"], pool["slots"], pool["slots_total"]) == (1024, 2, 2)
    (replica,) = client.get("/v1/pools/far/health").json()["replicas"]
    assert (replica["devices"], replica["vram_reserved_bytes"], replica["state"]) == ([], 0, "ready")
    found = client.get("/v1/capabilities").json()
    (engine,) = [one for one in found["engines"] if one["engine"] == "openai"]
    assert engine["determinism"].startswith("none")
    assert [one["vram_reserved_bytes"] for one in found["devices"]] == [0]
    assert found["concurrency"] == {"recommended": 4, "slots": 4}
    text = client.get("/metrics").text
    assert 'slots_total{engine="openai",engine_version="v1",pool_id="far",replica_id="far-0"} 2.0' in text
    assert "vram_used_bytes{" not in text


@pytest.mark.spec("HP-REM-1", "HP-REM-6", "HP-OAI-1")
def test_a_conversation_at_llama_cpp(service: LiveService, client: httpx.Client) -> None:
    """Through the second door, by OpenAI's own client: the tokens are the server's, and the schema is kept."""
    talk: Any = [{"role": "user", "content": "Tell me a story about a brave fox."}]
    with OpenAI(base_url=f"{service.url}/v1", api_key=service.token, timeout=LIMIT_S) as ours:
        answer = ours.chat.completions.create(model="far", messages=talk, max_tokens=12, seed=7)
        assert answer.choices[0].message.content
        assert answer.usage is not None
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (20, 12)
        shape: Any = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "boolean"}}}
        answer = ours.chat.completions.create(model="far", messages=talk, max_tokens=12, response_format=shape)
        assert json.loads(answer.choices[0].message.content or "") in (True, False)
    frames = finish(client, model_ref=FAR, max_tokens=8, seed=7)
    assert "".join(seen.data["t"] for seen in frames if seen.event == "token")
    end = frames[-1].data
    assert (end["tokens_in"], end["tokens_out"], end["finish_reason"], end["engine"]) == (5, 8, "length", "openai")


@pytest.mark.spec("HP-REM-6", "HP-ADM-4")
@pytest.mark.parametrize(
    ("pool", "more", "name"),
    [
        (FAR, {"determinism": "strict"}, "`determinism` strict"),
        (FAR, {"kv_hint": "cold"}, "`kv_hint`"),
        (ODD, {"sampling": {"top_k": 5}}, "`sampling.top_k`"),
        (ODD, {"sampling": {"min_p": 0.5}}, "`sampling.min_p`"),
        (ODD, {"sampling": {"repeat_penalty": 1.5}}, "`sampling.repeat_penalty`"),
        (ODD, {"sampling": {"json_schema": {"type": "boolean"}}}, "`sampling.json_schema`"),
        (ODD, {"sampling": {"grammar": 'root ::= "a"'}}, "`sampling.grammar`"),
        (ODD, {"workload": "embedding"}, "'embedding'"),
        (FAR, {"max_tokens": 1024}, "exceed the context of 1024"),
    ],
)
def test_what_it_cannot_be_asked_for(client: httpx.Client, pool: str, more: dict[str, Any], name: str) -> None:
    answer = client.post("/v1/tasks", json={"model_ref": pool, "prompt": "Once", **more})
    assert answer.status_code == 400
    assert answer.json()["code"] == "INVALID_PARAMS"
    assert name in answer.json()["message"]


@pytest.mark.spec("HP-REM-1")
def test_only_the_configuration_names_models_elsewhere(client: httpx.Client) -> None:
    for model in ("openai:odd/another", "openai:nobody/x"):
        assert client.post("/v1/tasks", json={"model_ref": model, "prompt": "x"}).status_code == 404
        assert client.post("/v1/pools/odd/reload", json={"new_model_ref": model}).status_code == 404


@pytest.mark.spec("HP-REM-1", "HP-CTL-2")
def test_such_a_pool_is_drained_and_reloaded(client: httpx.Client) -> None:
    """As any other; what is no model elsewhere is refused."""
    refused = client.post("/v1/pools/odd/reload", json={"new_model_ref": "builtin:tiny"})
    assert refused.status_code == 400
    assert "engine openai needs a model of a server elsewhere" in refused.json()["message"]
    assert client.post("/v1/pools/odd/drain", json={"deadline_ms": 1000}).status_code == 202
    assert client.post("/v1/tasks", json={"model_ref": ODD, "prompt": "x"}).status_code == 503
    assert client.post("/v1/pools/odd/reload", json={"new_model_ref": ODD}).status_code == 202
    until(lambda: is_ready(client, "odd"))
    assert finish(client, model_ref=ODD)[-1].event == "end"


def _code(frames: list[Any]) -> str:
    return str(frames[-1].data["code"])


@pytest.mark.spec("HP-REM-5", "HP-ERR-2")
def test_backpressure_is_passed_on(client: httpx.Client, odd: Upstream) -> None:
    """A busy server costs no task: they wait on their slots, then in the queue, and then our own 429 tells when to come
    again. Once the server is well, all of them are served."""
    odd.answers["/v1/completions"] = [fails(429, "full", "Retry-After: 0.1")]
    waiting = [submit(client, model_ref=ODD)["task_id"] for _ in range(4)]
    refused = client.post("/v1/tasks", json={"model_ref": ODD, "prompt": "x"})
    assert (refused.status_code, refused.json()["code"]) == (429, "ADMISSION_REJECT")
    assert int(refused.headers["Retry-After"]) >= 1
    until(lambda: len(odd.asked("/v1/completions")) >= 3)
    assert {task(client, task_id)["state"] for task_id in waiting} == {"running", "queued"}
    odd.answers["/v1/completions"] = [tells("one", " two")]
    assert [stream(client, task_id)[-1].event for task_id in waiting] == ["end"] * 4


@pytest.mark.spec("HP-REM-4")
def test_a_run_that_breaks_costs_itself_only(client: httpx.Client, odd: Upstream) -> None:
    """Before the first token it is tried again and its client sees nothing of it; after, it ends with an error that
    says so, and the task beside it goes on."""
    odd.answers["/v1/completions"] = [b"", fails(500), tells("one")]
    assert finish(client, model_ref=ODD)[-1].event == "end"
    let_go = Event()

    async def held(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, heard: Heard) -> None:
        writer.write(streams(delta("one")))
        await writer.drain()
        await asyncio.get_running_loop().run_in_executor(None, let_go.wait, LIMIT_S)
        writer.write(delta(" two", "stop"))

    odd.answers["/v1/completions"] = [held, streams(delta("one"))]
    beside = submit(client, model_ref=ODD)["task_id"]
    with live_frames(client, beside) as frames:
        until(lambda: len(odd.asked("/v1/completions")) >= 4)
        broken = finish(client, model_ref=ODD)
        assert _code(broken) == "WORKER_RESET"
        assert broken[-1].data["retriable"]
        let_go.set()
        assert list(frames)[-1].event == "end"


@pytest.mark.spec("HP-REM-3", "HP-STR-6")
def test_a_cancel_reaches_the_server(client: httpx.Client, odd: Upstream) -> None:
    gone = Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, heard: Heard) -> None:
        await reader.read(1)
        gone.set()

    odd.answers["/v1/completions"] = [silent]
    task_id = submit(client, model_ref=ODD)["task_id"]
    until(lambda: bool(odd.asked("/v1/completions")))
    assert client.post(f"/v1/tasks/{task_id}/cancel").status_code == 204
    assert gone.wait(5)
    assert _code(stream(client, task_id)) == "CANCELED"


@pytest.mark.spec("HP-REM-2", "HP-SEC-7")
def test_the_key_is_nowhere(service: LiveService, client: httpx.Client, tmp_path: Path) -> None:
    """Neither in the log, nor in metrics, health, command line, environment or what is kept. And the log has not a line
    for each connection."""
    finish(client, model_ref=FAR)
    pages = [client.get(path).text for path in ("/metrics", "/v1/pools/far/health", "/v1/capabilities", "/v1/pools")]
    process = Path(f"/proc/{service.pid}")
    told = [(process / name).read_bytes() for name in ("cmdline", "environ")]
    kept = [path.read_bytes() for path in service.home.rglob("*") if path.is_file()]
    for content in [service.log_path.read_bytes(), *told, *kept, *(page.encode() for page in pages)]:
        assert KEY.encode() not in content
    judged = [line for line in service.log() if line["logger"] == "llama_orch.outbound"]
    assert {line["purpose"] for line in judged} == {"engine"}
    assert len(judged) == 2  # servers


@pytest.mark.spec("HP-REM-3", "HP-ERR-4")
def test_a_server_that_goes_away_and_comes_back(client: httpx.Client, box: PlainServer) -> None:
    """Killed in mid-stream: the task ends with a typed error that may be repeated, the pool says so and tells of the
    reason; when the server is there again, so is the pool, without anybody's doing. The last test: `box` is no more."""
    asked = {"max_tokens": 900, "sampling": {"temperature": 1.5, "top_k": 0, "top_p": 1.0, "min_p": 0.0}}
    started = submit(client, model_ref=FAR, **asked)["task_id"]
    with live_frames(client, started) as frames:
        for seen in frames:
            if seen.event == "token":
                break
        box.process.kill()
        rest = list(frames)
    assert (_code(rest), rest[-1].data["retriable"]) == ("WORKER_RESET", True)
    until(lambda: not is_ready(client, "far"))
    assert "server box" in client.get("/v1/pools/far/health").json()["last_error"]
    answer = client.post("/v1/tasks", json={"model_ref": FAR, "messages": [{"role": "user", "content": "Hi"}]})
    assert (answer.status_code, answer.json()["code"]) == (503, "POOL_UNREADY")
    waiting = submit(client, model_ref=FAR, max_tokens=4)["task_id"]  # it fits in any case, and waits
    with plain_server(port=box.port):
        assert stream(client, waiting)[-1].event == "end"
