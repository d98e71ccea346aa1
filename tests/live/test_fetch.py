"""Models whose files come from elsewhere, on the real service: from a hub that is played on loopback."""

from __future__ import annotations

import json
from collections.abc import Iterator
from hashlib import sha256
from typing import Any

import httpx
import pytest

from tests.hub import Hub, a_hub
from tests.live.client import finish, open_client, until
from tests.live.models import TINY
from tests.live_service import LiveService, live_service

pytestmark = pytest.mark.xdist_group("catalog")

MODELS = "/v1/catalog/models"
SOURCE = "hf:org/repo/story.gguf"
CONTENT = TINY + b"from elsewhere"
SHORT = {"max_tokens": 4}


def digest(content: bytes) -> str:
    return f"sha256:{sha256(content).hexdigest()}"


def configuration(*, is_open: bool = True, **catalog: Any) -> dict[str, Any]:
    """With its own machine open to fetches, which it is not by default."""
    outbound = {"policy": {"outbound": {"allow_private_addresses": True}}} if is_open else {}
    return {"pools": [{"id": "default", "ctx": 512, "slots": 1}], "catalog": catalog, **outbound}


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with a_hub(CONTENT) as hub:
        yield hub


@pytest.fixture(scope="module")
def service(hub: Hub) -> Iterator[LiveService]:
    with live_service(configuration(), env={"HF_ENDPOINT": hub.url}) as running:
        yield running


@pytest.fixture
def client(service: LiveService) -> Iterator[httpx.Client]:
    with open_client(service) as client:
        yield client


def enter(client: httpx.Client, model_id: str, source: str = SOURCE, **declared: Any) -> httpx.Response:
    return client.post(MODELS, json={"id": model_id, "source_url": source, **declared})


def fetch(client: httpx.Client, model_id: str) -> list[dict[str, Any]]:
    """Begin it, and read what its stream says until its end."""
    begun = client.post(f"{MODELS}/{model_id}/fetch")
    assert begun.status_code == 202, begun.text
    answer = client.get(f"{MODELS}/{model_id}/fetch")
    assert answer.headers["content-type"].startswith("text/event-stream")
    return [json.loads(line.removeprefix("data: ")) for line in answer.text.splitlines() if line.startswith("data: ")]


def files(service: LiveService) -> set[str]:
    folder = service.home / "models"
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def refusal(client: httpx.Client, reference: str) -> tuple[int, str]:
    answer = client.post("/v1/tasks", json={"model_ref": reference, "prompt": "Once", **SHORT})
    return answer.status_code, answer.json()["code"]


@pytest.mark.spec("HP-CTL-1")
def test_a_model_is_fetched_served_and_deleted(service: LiveService, client: httpx.Client) -> None:
    """By its id and by its reference; its file goes with it."""
    entered = enter(client, "story", digest=digest(CONTENT))
    assert entered.status_code == 201
    assert entered.json()["fetch"] == {"state": "none", "received_bytes": 0, "total_bytes": None, "error": None}
    for reference in ("story", SOURCE, "hf:org/repo/unknown.gguf"):  # nobody asked for it, and tasks do not by default
        assert refusal(client, reference) == (404, "NOT_FOUND")
    events = fetch(client, "story")
    size = len(CONTENT)
    assert events[-1] == {"state": "done", "received_bytes": size, "total_bytes": size, "error": None}
    model = client.get(f"{MODELS}/story").json()
    assert (model["fetch"], model["size_bytes"]) == (events[-1], size)
    assert model["verification"]["outcome"] == "passed"
    for reference in ("story", SOURCE, digest(CONTENT)):
        assert finish(client, model_ref=reference, **SHORT)[-1].data["model_digest"] == digest(CONTENT)
    assert len(files(service)) == 1
    assert fetch(client, "story")[-1]["state"] == "done"
    pool = next(one for one in client.get("/v1/pools").json()["items"] if one["model"] == "story")
    client.post(f"/v1/pools/{pool['id']}/drain", json={"deadline_ms": 0})
    until(lambda: client.delete(f"{MODELS}/story").status_code == 204)
    assert files(service) == set()


@pytest.mark.spec("HP-CTL-4")
@pytest.mark.parametrize(
    ("name", "declared"),
    [
        ("digest", {"digest": "sha256:" + "0" * 64}),
        ("size", {"manifests": [{"digest": digest(CONTENT), "size_bytes": 7}]}),
    ],
)
def test_what_is_not_what_was_declared_gets_no_name(
    service: LiveService, client: httpx.Client, name: str, declared: dict[str, Any]
) -> None:
    """The fetch fails, and nothing of the file stays."""
    enter(client, f"wrong-{name}", **declared)
    last = fetch(client, f"wrong-{name}")[-1]
    assert last["state"] == "failed"
    assert "declared" in last["error"]
    assert files(service) == set()
    assert refusal(client, f"wrong-{name}") == (404, "NOT_FOUND")


def test_a_file_of_this_machine_is_there(client: httpx.Client) -> None:
    """Nothing is to be fetched, and the answer says so."""
    enter(client, "here", "builtin:tiny")
    assert [event["state"] for event in fetch(client, "here")] == ["done"]
    assert client.get(f"{MODELS}/here").json()["fetch"] is None
    assert client.post(f"{MODELS}/nowhere/fetch").status_code == 404
    assert client.get(f"{MODELS}/nowhere/fetch").status_code == 404


@pytest.mark.spec("HP-SEC-4")
def test_a_fetch_goes_through_the_outbound_policy(hub: Hub) -> None:
    """This machine's own addresses are closed by default; nothing is connected to. A task that would have it fetched is
    refused as well, and enters nothing into the catalog."""
    heard = len(hub.heard)
    env = {"HF_ENDPOINT": hub.url}
    settings = configuration(is_open=False) | {"on_demand": {"fetch": True}}
    with live_service(settings, env=env) as running, open_client(running) as client:
        for reference in ("hf:org/repo/other.gguf", "https://127.0.0.1/model.gguf"):
            assert refusal(client, reference) == (403, "POLICY_DENIED")
        assert client.get(MODELS).json()["items"] == []
        enter(client, "story")
        answer = client.post(f"{MODELS}/story/fetch")
        assert refusal(client, "story") == (403, "POLICY_DENIED")
        assert len(client.get("/v1/pools").json()["items"]) == 1
    assert (answer.status_code, answer.json()["code"]) == (403, "POLICY_DENIED")
    assert len(hub.heard) == heard


@pytest.mark.spec("HP-CTL-4")
def test_a_strict_policy_takes_models_from_its_registries_only(hub: Hub) -> None:
    """And of them none for a task that has no declared digest: it would not be served either."""
    policy, heard = {"mode": "strict", "allowed_registries": ["huggingface.co/org"]}, len(hub.heard)
    settings = configuration(trust_policy=policy) | {"on_demand": {"fetch": True}}
    with live_service(settings, env={"HF_ENDPOINT": hub.url}) as running, open_client(running) as client:
        foreign = enter(client, "foreign", "hf:other/repo/story.gguf")
        assert (foreign.status_code, foreign.json()["code"]) == (403, "UNTRUSTED_ARTIFACT")
        assert enter(client, "own").status_code == 201
        for reference in ("own", SOURCE, "hf:org/repo/unknown.gguf"):
            assert refusal(client, reference) == (403, "UNTRUSTED_ARTIFACT")
    assert len(hub.heard) == heard
