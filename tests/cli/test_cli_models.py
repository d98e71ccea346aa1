"""`llama-orch models`: what is sent, what is shown, and how waiting ends."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from catalog_service import DIGEST
from conftest import Invoke, Start
from contract_service import ContractService, Refusal, error

from llama_orch.client import calls

MODELS = "/v1/catalog/models"


@pytest.fixture(autouse=True)
def no_time_between_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "POLL_S", 0.0)


def last(service: ContractService) -> tuple[str, str, object]:
    seen = service.seen[-1]
    return seen.method, seen.path.partition("?")[0], seen.body


def test_models_are_listed_and_shown(remote: Invoke, service: ContractService) -> None:
    """With sizes for people, and without control characters."""
    listed, shown = remote("models", "ls"), remote("models", "show", "story")
    assert (listed.exit_code, shown.exit_code) == (0, 0)
    assert last(service) == ("GET", f"{MODELS}/story", None)
    for said in (listed.stdout, shown.stdout):
        assert "story" in said
        assert "builtin:tiny" in said
        assert "\x1b" not in said
    assert "4.0 GiB" in listed.stdout


@pytest.mark.parametrize("arguments", [["ls"], ["show", "story"], ["retire", "story"], ["activate", "story"]])
def test_json_is_the_services_answer(remote: Invoke, service: ContractService, arguments: list[str]) -> None:
    result = remote("models", *arguments, "--json")
    answer = json.loads(result.stdout)
    model = answer["items"][0] if arguments == ["ls"] else answer
    assert model == service.catalog.models["story"]


@pytest.mark.spec("HP-CTL-1")
def test_an_entry_is_sent_as_it_was_given(remote: Invoke, service: ContractService, tmp_path: Path) -> None:
    """Options before what the file says."""
    signature = {"signer": "a", "digest": DIGEST, "signature": "c2ln"}
    declared = tmp_path / "declared.json"
    declared.write_text(json.dumps({"signatures": [signature], "digest": "sha256:" + "0" * 64}))
    options = ["--digest", DIGEST, "--tag", "a", "--tag", "b", "--declared", str(declared)]
    result = remote("models", "add", "new", "file:/m.gguf", *options)
    assert result.exit_code == 0
    body = {"id": "new", "source_url": "file:/m.gguf", "digest": DIGEST, "tags": ["a", "b"]}
    assert last(service) == ("POST", MODELS, body | {"signatures": [signature], "manifests": [], "sbom": None})


@pytest.mark.parametrize(
    "arguments",
    [
        ["add", "a/b", "builtin:tiny"],
        ["add", "a", "builtin:tiny", "--digest", "sha256:0"],
        ["add", "a", "builtin:tiny", "--declared", "absent.json"],
        ["retire", "story", "--deadline-ms", "604800001"],
    ],
)
def test_what_would_be_refused_is_not_sent(remote: Invoke, service: ContractService, arguments: list[str]) -> None:
    """Exit code 2."""
    assert remote("models", *arguments).exit_code == 2
    assert service.seen == []


@pytest.mark.spec("HP-CTL-4")
@pytest.mark.parametrize(("model_id", "code"), [("story", 0), ("wrong", 1)])
def test_a_verification_is_waited_for(remote: Invoke, service: ContractService, model_id: str, code: int) -> None:
    """Each news once on stderr, with the warnings or the problems at the end; the exit code says how it ended."""
    remote("models", "add", "wrong", "builtin:tiny")
    result = remote("models", "verify", model_id, "--json")
    assert result.exit_code == code
    assert json.loads(result.stdout)["verification"]["outcome"] == ("failed" if code else "passed")
    assert result.stderr.count("25 % of 4.0 GiB") == 1
    assert "75 %" in result.stderr
    assert ("error: the file's digest" if code else "warning: no signature") in result.stderr
    assert "\x1b" not in result.stderr


def test_a_verification_need_not_be_waited_for(remote: Invoke, service: ContractService) -> None:
    result = remote("models", "verify", "story", "--no-wait")
    assert result.exit_code == 0
    assert "running" in result.stdout
    assert [seen.method for seen in service.seen] == ["POST", "GET"]


@pytest.mark.spec("HP-CTL-3")
@pytest.mark.parametrize(
    ("arguments", "body"),
    [
        (["retire", "story"], {"state": "Retired", "deadline_ms": None}),
        (["retire", "story", "--deadline-ms", "5"], {"state": "Retired", "deadline_ms": 5}),
        (["activate", "story"], {"state": "Active", "deadline_ms": None}),
    ],
)
def test_a_model_is_put_in_a_state(
    remote: Invoke, service: ContractService, arguments: list[str], body: dict[str, object]
) -> None:
    result = remote("models", *arguments)
    assert result.exit_code == 0
    assert last(service) == ("POST", f"{MODELS}/story/state", body)
    assert str(body["state"]) in result.stdout


def test_models_are_deleted(remote: Invoke, service: ContractService) -> None:
    """All that are named, until one cannot be."""
    remote("models", "add", "b", "builtin:tiny")
    result = remote("models", "rm", "story", "b", "absent")
    assert result.exit_code == 1
    assert "NOT_FOUND" in result.stderr
    assert service.catalog.models == {}


def test_a_refusal_is_shown_with_its_exit_code(remote: Invoke, service: ContractService) -> None:
    service.refusals.append(Refusal(409, error("CONFLICT")))
    result = remote("models", "rm", "story")
    assert result.exit_code == 1
    assert "it is CONFLICT" in result.stderr


def test_ctrl_c_leaves_the_verification_alone(start: Start, service: ContractService) -> None:
    """Exit code 130, and where to look."""
    service.catalog.endless = True
    extra = {"LLORCH_URL": service.url, "LLORCH_API_TOKEN": service.token}
    process = start("models", "verify", "story", extra=extra)
    assert process.stderr is not None
    line = process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "models show story" in line + rest


@pytest.mark.parametrize(("source", "code"), [("hf:a/b/c.gguf", 0), ("hf:a/b/wrong.gguf", 1)])
def test_a_fetch_is_waited_for(remote: Invoke, service: ContractService, source: str, code: int) -> None:
    """Each news once on stderr; the exit code says how it ended."""
    remote("models", "add", "far", source)
    result = remote("models", "fetch", "far", "--json")
    assert result.exit_code == code
    assert json.loads(result.stdout)["fetch"]["state"] == ("failed" if code else "done")
    assert result.stderr.count("25% of 4.0 GiB") == 1
    assert "[###############...............]  50%" in result.stderr
    assert ("error: what was fetched is another file" in result.stderr) == bool(code)
    assert "\x1b" not in result.stderr


def test_a_fetch_need_not_be_waited_for(remote: Invoke, service: ContractService) -> None:
    remote("models", "add", "far", "hf:a/b/c.gguf")
    result = remote("models", "fetch", "far", "--no-wait")
    assert result.exit_code == 0
    assert [seen.method for seen in service.seen[1:]] == ["POST", "GET"]
