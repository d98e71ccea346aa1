"""The catalog on the real service: what it promises of models holds for tasks, pools, files and restarts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.live.client import finish, open_client, stream, submit, until
from tests.live.models import a_model, digest, health, long_task, pools, ref, samples, states, total
from tests.live_service import LiveService, live_service

pytestmark = pytest.mark.xdist_group("catalog")

WRONG = "sha256:" + "0" * 64
MODELS = "/v1/catalog/models"
SHORT = {"max_tokens": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where model files may be named."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def service(folder: Path) -> Iterator[LiveService]:
    with live_service(configuration(folder)) as running:
        yield running


@pytest.fixture
def client(service: LiveService) -> Iterator[httpx.Client]:
    with open_client(service) as client:
        yield client


def configuration(folder: Path, **catalog: Any) -> dict[str, Any]:
    return {
        "devices": [{"id": "cpu", "backend": "cpu"}],
        "pools": [{"id": "default", "ctx": 512, "slots": 1}],
        "catalog": {"file_roots": [str(folder)], **catalog},
    }


def enter(client: httpx.Client, model_id: str, source: str, **declared: Any) -> dict[str, Any]:
    answer = client.post(MODELS, json={"id": model_id, "source_url": source, **declared})
    assert answer.status_code == 201, answer.text
    entered: dict[str, Any] = answer.json()
    return entered


def model(client: httpx.Client, model_id: str) -> dict[str, Any]:
    answer = client.get(f"{MODELS}/{model_id}")
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def verified(client: httpx.Client, model_id: str) -> dict[str, Any]:
    """The verification's outcome."""
    answer = client.post(f"{MODELS}/{model_id}/verify")
    assert answer.status_code == 202, answer.text
    assert answer.json()["state"] in ("queued", "running")
    until(lambda: model(client, model_id)["verification"]["state"] == "done")
    outcome: dict[str, Any] = model(client, model_id)["verification"]
    return outcome


def put(client: httpx.Client, model_id: str, state: str, **more: Any) -> httpx.Response:
    return client.post(f"{MODELS}/{model_id}/state", json={"state": state, **more})


def refusal(client: httpx.Client, reference: str) -> tuple[int, str]:
    answer = client.post("/v1/tasks", json={"model_ref": reference, "prompt": "Once", **SHORT})
    assert answer.status_code >= 400, answer.text
    return answer.status_code, answer.json()["code"]


# -- entries ---------------------------------------------------------------------------------------------------------


@pytest.mark.spec("HP-CTL-1")
def test_an_entry_is_made_once_and_read_listed_and_deleted(client: httpx.Client, folder: Path) -> None:
    """Another body under the same id is in conflict; a second page goes on where the first one ends."""
    path = a_model(folder, "entry")
    body = {"id": "entry", "source_url": ref(path), "tags": ["small"], "digest": digest(path)}
    made, again = client.post(MODELS, json=body), client.post(MODELS, json=body)
    assert (made.status_code, again.status_code) == (201, 200)
    assert made.json() == again.json() == model(client, "entry")
    assert made.json()["state"] == "Active"
    assert made.json()["size_bytes"] == path.stat().st_size
    assert made.json()["gguf"]["architecture"] == "llama"
    assert made.json()["gguf"]["vram_bytes"] > path.stat().st_size
    assert client.post(MODELS, json=body | {"tags": []}).status_code == 409
    enter(client, "entry-2", "builtin:tiny")
    first = client.get(MODELS, params={"limit": 1}).json()
    rest = client.get(MODELS, params={"cursor": first["next_cursor"], "limit": 200}).json()
    ids = [one["id"] for one in first["items"] + rest["items"]]
    assert ids.index("entry") < ids.index("entry-2")
    assert len(ids) == len(set(ids))
    assert client.delete(f"{MODELS}/entry").status_code == 204
    assert client.get(f"{MODELS}/entry").status_code == 404
    assert client.delete(f"{MODELS}/entry").status_code == 404


@pytest.mark.spec("HP-CTL-1", "HP-SEC-4")
def test_files_outside_of_the_roots_cannot_be_entered(client: httpx.Client, folder: Path, tmp_path: Path) -> None:
    """Neither directly nor through a link or `..`, and nobody learns whether they are there."""
    outside = a_model(tmp_path, "outside")
    (folder / "link.gguf").symlink_to(outside)
    answers = [
        client.post(MODELS, json={"id": "x", "source_url": source})
        for source in (
            ref(outside),
            ref(tmp_path / "absent.gguf"),
            ref(folder / "link.gguf"),
            f"file:{folder}/../{tmp_path.name}/outside.gguf",
            "file:relative.gguf",
        )
    ]
    assert [(answer.status_code, answer.json()["code"]) for answer in answers] == [(403, "POLICY_DENIED")] * 5
    assert len({answer.json()["message"] for answer in answers}) == 1


@pytest.mark.parametrize("source", ["builtin:absent", "ftp://example.org/a.gguf", "nothing", "hf:org/repo"])
def test_sources_that_lead_nowhere_are_refused(client: httpx.Client, source: str) -> None:
    """By name, and nothing is entered."""
    answer = client.post(MODELS, json={"id": "nowhere", "source_url": source})
    assert (answer.status_code, answer.json()["code"]) == (400, "INVALID_PARAMS")
    assert client.get(f"{MODELS}/nowhere").status_code == 404


# -- references ------------------------------------------------------------------------------------------------------


@pytest.mark.spec("HP-CTL-1")
def test_an_id_and_a_digest_are_model_references(client: httpx.Client, folder: Path) -> None:
    """They lead to the same pool, on demand, and to that of a configured pool with the same file."""
    path = a_model(folder, "named")
    enter(client, "named", ref(path), digest=digest(path))
    ends = [finish(client, model_ref=name, **SHORT)[-1].data for name in ("named", digest(path), ref(path))]
    assert {end["model_digest"] for end in ends} == {digest(path)}
    assert list(pools(client)).count("named") == 1
    assert digest(path) not in pools(client)
    enter(client, "shipped", "builtin:tiny")
    admission = submit(client, model_ref="shipped", **SHORT)
    assert admission["pool_id"] == "default"
    stream(client, admission["task_id"])


@pytest.mark.spec("HP-CTL-1")
def test_what_a_pool_serves_cannot_be_deleted(client: httpx.Client, folder: Path) -> None:
    """Once it is drained it can, and a new entry under the same id is another model to tasks."""
    old, new = a_model(folder, "old"), a_model(folder, "new")
    enter(client, "changing", ref(old))
    finish(client, model_ref="changing", **SHORT)
    refused = client.delete(f"{MODELS}/changing")
    assert (refused.status_code, refused.json()["code"]) == (409, "CONFLICT")
    pool = pools(client)["changing"]["id"]
    client.post(f"/v1/pools/{pool}/drain", json={"deadline_ms": 0})
    until(lambda: set(states(client, pool).values()) == {"unloaded"})
    assert client.delete(f"{MODELS}/changing").status_code == 204
    assert refusal(client, "changing") == (404, "NOT_FOUND")
    enter(client, "changing", ref(new))
    assert finish(client, model_ref="changing", **SHORT)[-1].data["model_digest"] == digest(new)


def test_a_pool_is_reloaded_to_an_id(client: httpx.Client, folder: Path) -> None:
    path = a_model(folder, "successor")
    enter(client, "successor", ref(path))
    for reference in ("successor", "builtin:tiny"):
        answer = client.post("/v1/pools/default/reload", json={"new_model_ref": reference})
        assert answer.status_code == 202, answer.text
        until(lambda: health(client, "default")["last_reload"].startswith("done:"))
        assert client.get("/v1/pools/default").json()["model"] == reference


# -- verification ----------------------------------------------------------------------------------------------------


@pytest.mark.spec("HP-CTL-4", "HP-OBS-4", "HP-OBS-2")
def test_a_verification_finds_the_digest_and_logs_what_is_missing(
    service: LiveService, client: httpx.Client, folder: Path
) -> None:
    path = a_model(folder, "plain")
    enter(client, "plain", ref(path))
    before = total(client, "catalog_verifications_total", outcome="passed")
    outcome = verified(client, "plain")
    assert (outcome["outcome"], outcome["digest"], outcome["problems"]) == ("passed", digest(path), [])
    assert any("signature" in warning for warning in outcome["warnings"])
    assert any("SBOM" in warning for warning in outcome["warnings"])
    assert model(client, "plain")["digest"] == digest(path)
    assert total(client, "catalog_verifications_total", outcome="passed") == before + 1
    lines = [line for line in service.log() if line.get("model_id") == "plain" and line["level"] == "warning"]
    assert {"no signature", "no SBOM"} <= {line["message"].split(": ")[1].split(" was")[0] for line in lines}


@pytest.mark.attack(15)
@pytest.mark.spec("HP-CTL-4", "HP-ADM-7")
@pytest.mark.parametrize(
    ("name", "claim"),
    [
        ("digest", {"digest": WRONG}),
        ("manifest", {"manifests": [{"digest": WRONG}]}),
        ("size", {"manifests": [{"digest": "its own", "size_bytes": 7}]}),
        ("signature", {"signatures": [{"signer": "somebody", "digest": WRONG, "signature": "c2ln"}]}),
        ("sbom", {"sbom": {"format": "SPDX", "url": "https://example.org/sbom", "model_digest": WRONG}}),
    ],
)
def test_a_mismatch_keeps_every_task_out(client: httpx.Client, folder: Path, name: str, claim: dict[str, Any]) -> None:
    """Also where nobody asked for the verification: the first task that names the model waits for it."""
    path = a_model(folder, f"wrong-{name}")
    if name == "size":
        claim = {"manifests": [{"digest": digest(path), "size_bytes": 7}]}
    enter(client, f"wrong-{name}", ref(path), **claim)
    assert refusal(client, f"wrong-{name}") == (403, "UNTRUSTED_ARTIFACT")
    outcome = verified(client, f"wrong-{name}")
    assert outcome["outcome"] == "failed"
    assert outcome["problems"]
    answer = client.post("/v1/pools/default/reload", json={"new_model_ref": f"wrong-{name}"})
    assert (answer.status_code, answer.json()["code"]) == (403, "UNTRUSTED_ARTIFACT")
    assert f"wrong-{name}" not in pools(client)
    assert finish(client, model_ref=ref(path), **SHORT)[-1].event == "end"  # nobody declared that of the file itself


@pytest.mark.spec("HP-CTL-4")
def test_what_was_declared_and_is_true_passes(client: httpx.Client, folder: Path) -> None:
    path = a_model(folder, "true")
    true = digest(path)
    enter(
        client,
        "true",
        ref(path),
        digest=true,
        manifests=[{"digest": true, "size_bytes": path.stat().st_size}],
        signatures=[{"signer": "somebody", "digest": true, "signature": "c2ln"}],
        sbom={"format": "SPDX", "url": "https://example.org/sbom", "model_digest": true},
    )
    outcome = verified(client, "true")
    assert (outcome["outcome"], outcome["warnings"], outcome["problems"]) == ("passed", [], [])


@pytest.mark.spec("HP-CTL-4")
def test_a_file_that_was_changed_after_its_verification_is_not_served(client: httpx.Client, folder: Path) -> None:
    path = a_model(folder, "swapped")
    enter(client, "swapped", ref(path), digest=digest(path))
    assert verified(client, "swapped")["outcome"] == "passed"
    path.write_bytes(path.read_bytes() + b"changed")
    assert refusal(client, "swapped") == (403, "UNTRUSTED_ARTIFACT")


def test_a_verification_tells_how_far_it_is(client: httpx.Client, folder: Path) -> None:
    """A file of some gigabytes that takes no room is read by another process, while the service answers. What a task
    waits for does not wait behind it."""
    path = folder / "huge.gguf"
    with path.open("wb") as file:
        file.truncate(8 << 30)
    enter(client, "huge", ref(path))
    client.post(f"{MODELS}/huge/verify")
    seen: list[int] = []

    def is_under_way() -> bool:
        verification = model(client, "huge")["verification"]
        seen.append(verification["read_bytes"] or 0)
        return verification["state"] == "running" and 0 < seen[-1] < verification["total_bytes"] == 8 << 30

    until(is_under_way)
    assert seen == sorted(seen)
    small = a_model(folder, "beside-huge")
    enter(client, "beside-huge", ref(small), digest=digest(small))
    assert finish(client, model_ref="beside-huge", **SHORT)[-1].event == "end"
    assert model(client, "huge")["verification"]["state"] == "running"


# -- retirement ------------------------------------------------------------------------------------------------------


@pytest.mark.spec("HP-CTL-3", "HP-ADM-7", "HP-OBS-2")
def test_a_retired_model_finishes_what_it_has_and_leaves(client: httpx.Client, folder: Path) -> None:
    """Under every name it gets no new tasks; once it is active it is served again."""
    path = a_model(folder, "leaving")
    enter(client, "leaving", ref(path), digest=digest(path))
    running = submit(client, model_ref="leaving", max_tokens=200)
    pool = running["pool_id"]
    until(lambda: health(client, pool)["ready"])
    answer = put(client, "leaving", "Retired")
    assert (answer.status_code, answer.json()["state"]) == (202, "Retired")
    for name in ("leaving", ref(path), digest(path)):
        assert refusal(client, name) == (409, "MODEL_DEPRECATED")
    assert stream(client, running["task_id"])[-1].event == "end"
    until(lambda: set(states(client, pool).values()) == {"unloaded"})
    gauge = {
        labels["state"]: value for labels, value in samples(client, "model_state") if labels["model_id"] == "leaving"
    }
    assert gauge == {"Active": 0, "Retired": 1}
    assert put(client, "leaving", "Active").status_code == 202
    assert finish(client, model_ref="leaving", **SHORT)[-1].event == "end"


@pytest.mark.spec("HP-CTL-3")
def test_what_runs_at_the_deadline_of_a_retired_model_ends(client: httpx.Client, folder: Path) -> None:
    path = a_model(folder, "late")
    enter(client, "late", ref(path))
    task_id = long_task(client, model_ref="late")
    put(client, "late", "Retired", deadline_ms=50)
    last = stream(client, task_id)[-1]
    assert (last.event, last.data["code"]) == ("error", "MODEL_DEPRECATED")


@pytest.mark.spec("HP-CTL-3")
def test_the_model_of_a_configured_pool_leaves_and_comes_back(client: httpx.Client) -> None:
    """Its pool is unloaded, and loaded again without anybody's asking. The old names are refused meanwhile."""
    enter(client, "the-default", "builtin:tiny")
    others = [one["id"] for one in client.get(MODELS, params={"limit": 200}).json()["items"]]
    twins = [one for one in others if model(client, one)["source_url"] == "builtin:tiny"]
    for one in twins:
        put(client, one, "Retired")
    until(lambda: set(states(client, "default").values()) == {"unloaded"})
    assert refusal(client, "builtin:tiny") == (409, "MODEL_DEPRECATED")
    for one in twins:
        put(client, one, "Active")
    until(lambda: health(client, "default")["ready"])
    assert finish(client, **SHORT)[-1].event == "end"


# -- restarts --------------------------------------------------------------------------------------------------------


@pytest.mark.spec("HP-CTL-3", "HP-CTL-4")
def test_a_restart_keeps_what_the_catalog_says(folder: Path, tmp_path: Path) -> None:
    """A pool whose model was retired is not loaded, and one whose model is an id is; a verification that was asked for
    comes to its end."""
    good, bad = a_model(folder, "kept"), a_model(folder, "kept-wrong")
    huge = folder / "kept-huge.gguf"
    with huge.open("wb") as file:
        file.truncate(4 << 30)
    env = {"LLORCH_HOME": str(tmp_path / "home")}
    tmp_path.joinpath("home").mkdir()
    with live_service(configuration(folder), env=env) as running, open_client(running) as client:
        enter(client, "kept", ref(good), digest=digest(good))
        enter(client, "kept-wrong", ref(bad), digest=WRONG)
        enter(client, "tiny", "builtin:tiny")
        enter(client, "kept-huge", ref(huge))
        put(client, "tiny", "Retired")
        assert client.post(f"{MODELS}/kept-huge/verify").status_code == 202
        os.kill(running.pid, 9)
    huge.unlink()
    small = configuration(folder) | {
        "pools": [{"id": "default", "ctx": 512}, {"id": "own", "model": "kept", "ctx": 512}]
    }
    with live_service(small, env=env) as running, open_client(running) as client:
        assert model(client, "tiny")["state"] == "Retired"
        assert finish(client, model_ref="kept", **SHORT)[-1].data["model_digest"] == digest(good)
        assert states(client, "default") == {"cpu": "unloaded"}
        assert refusal(client, "builtin:tiny") == (409, "MODEL_DEPRECATED")
        assert refusal(client, "kept-wrong") == (403, "UNTRUSTED_ARTIFACT")
        until(lambda: model(client, "kept-huge")["verification"]["state"] == "done")
        assert model(client, "kept-huge")["verification"]["problems"]
        assert not [line for line in running.log() if line["message"] == "replica default-0 is ready"]


# -- a strict policy ---------------------------------------------------------------------------------------------------


@pytest.mark.spec("HP-CTL-4", "HP-ADM-7")
def test_a_strict_policy_serves_what_the_catalog_stands_for(folder: Path) -> None:
    """A file that nobody entered, one without a declared digest, and one without the signature that is required are not
    served; what ships inside the package is."""
    path, other = a_model(folder, "strict"), a_model(folder, "strict-2")
    true = digest(path)
    policy = {"mode": "strict", "require_signature": True}
    with live_service(configuration(folder, trust_policy=policy)) as running, open_client(running) as client:
        assert finish(client, **SHORT)[-1].event == "end"
        assert refusal(client, ref(other)) == (403, "UNTRUSTED_ARTIFACT")
        enter(client, "no-digest", ref(other), signatures=[{"signer": "a", "digest": digest(other), "signature": "c"}])
        assert refusal(client, "no-digest") == (403, "UNTRUSTED_ARTIFACT")
        enter(client, "unsigned", ref(path), digest=true)
        assert refusal(client, "unsigned") == (403, "UNTRUSTED_ARTIFACT")
        assert model(client, "unsigned")["verification"]["problems"] == ["no signature was declared"]
        enter(
            client, "signed", ref(path), digest=true, signatures=[{"signer": "a", "digest": true, "signature": "c2ln"}]
        )
        assert finish(client, model_ref="signed", **SHORT)[-1].data["model_digest"] == true
        assert model(client, "signed")["trust_policy"] == policy | {"allowed_registries": [], "require_sbom": False}
