"""The outbound policy of a running service: what it fetches, what it refuses to, and what it writes down of both."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.live.client import open_client
from tests.live.elsewhere import elsewhere
from tests.live_service import LiveService, live_service

pytestmark = [pytest.mark.spec("HP-SEC-4"), pytest.mark.attack(6)]
SECRET = "signature-hunter2"


def configuration(folder: Path, **outbound: Any) -> dict[str, Any]:
    model = folder / "none.gguf"  # a simulated engine reads none
    model.touch()
    pool = {"id": "default", "engine": "simulated", "model": f"file:{model}"}
    return {"pools": [pool], "policy": {"outbound": outbound}}


def fetch(client: httpx.Client, url: str, **more: Any) -> httpx.Response:
    return client.post("/v1/tools/fetch", json={"url": url, **more})


def test_what_a_service_fetches_and_writes_down(tmp_path: Path) -> None:
    """Allowed, denied, redirected to what is denied, broken and no text: each answer as the contract has it, each
    decision a line of the log without the query, and counted."""
    with elsewhere() as (url, heard):
        port = url.rpartition(":")[2]
        with live_service(configuration(tmp_path, allow=[f"127.0.0.1:{port}"], deny=["*.evil.example"])) as service:
            with open_client(service) as client:
                answers = {
                    path: fetch(client, f"{url}{path}?k={SECRET}") for path in ("/text", "/back", "/short", "/picture")
                }
                denied = fetch(client, f"http://x.evil.example/?k={SECRET}")
                own = fetch(client, f"{service.url}/healthz")
                checked = client.post("/v1/policy/outbound/check", json={"url": f"{url}/check?k={SECRET}"})
                metrics = client.get("/metrics").text
            log = service.log()
    result = answers["/text"].json()
    assert (result["status"], result["text"], result["url"]) == (200, "näh", f"{url}/text?k={SECRET}")
    assert [answer.status_code for answer in answers.values()] == [200, 403, 502, 502]
    assert answers["/back"].json()["policy_label"] == "address"
    assert (denied.status_code, denied.json()["policy_label"]) == (403, "deny[0]")
    assert (own.status_code, own.json()["policy_label"]) == (403, "address")
    assert (checked.status_code, checked.json()["allowed"]) == (200, True)
    assert len(heard) == 4

    lines = {entry["audit_id"]: entry for entry in log if "audit_id" in entry}
    for audit_id, word, rule in (
        (result["audit_id"], "allow", "allow[0]"),
        (answers["/back"].json()["details"]["audit_id"], "deny", "address"),
        (denied.json()["details"]["audit_id"], "deny", "deny[0]"),
        (checked.json()["audit_id"], "allow", "allow[0]"),
    ):
        assert (lines[audit_id]["decision"], lines[audit_id]["rule"]) == (word, rule)
        assert lines[audit_id]["correlation_id"]
    assert not any(SECRET in str(entry) for entry in log)
    count = 'policy_outbound_decisions_total{decision="%s",purpose="%s",rule="%s"} %.1f'
    assert count % ("allow", "tool", "allow[0]", 4) in metrics
    assert count % ("deny", "tool", "address", 2) in metrics
    assert count % ("deny", "tool", "deny[0]", 1) in metrics
    assert count % ("allow", "check", "allow[0]", 1) in metrics


def refused(service: LiveService, url: str) -> str:
    with open_client(service) as client:
        answer = client.post("/v1/policy/outbound/check", json={"url": url})
    assert answer.status_code == 200
    body = answer.json()
    return "allowed" if body["allowed"] else body["rule"]


def test_the_defaults_of_a_service(tmp_path: Path) -> None:
    """Public addresses may be called; this machine, its network and odd spellings of either may not."""
    with live_service(configuration(tmp_path)) as service:
        assert refused(service, "https://8.8.8.8/") == "allowed"
        assert refused(service, f"{service.url}/metrics") == "address"
        for url in ("http://localhost/", "http://169.254.169.254/", "http://192.168.1.1/", "http://[::ffff:7f00:1]/"):
            assert refused(service, url) == "address"
        for url in ("http://2130706433/", "http://0x7f.1/", "http://a@8.8.8.8/"):
            assert refused(service, url) == "invalid-url"


def test_a_list_that_cannot_be_read_stops_the_start(tmp_path: Path) -> None:
    """`config check` names the entry."""
    config = tmp_path / "c.yaml"
    config.write_text("policy: {outbound: {deny: ['https://evil.example/path']}}")
    command = [sys.executable, "-P", "-m", "llama_orch.cli", "config", "check", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "policy.outbound.deny[0]" in done.stdout + done.stderr
