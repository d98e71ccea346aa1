"""Artifacts of the whole service: over the command line, on a full disk, and copied while it runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.live.client import LIMIT_S, finish, open_client, until
from tests.live_service import live_service
from tests.stores.conftest import fill, small_disk

__all__ = ["fill", "small_disk"]
pytestmark = pytest.mark.xdist_group("death")

# No model is needed to store things: the pool's worker is a simulated one.
SMALL: dict[str, Any] = {
    "devices": [{"id": "gpu0", "backend": "simulated", "vram_bytes": 1 << 34}],
    "pools": [{"id": "default", "engine": "simulated", "slots": 1}],
}


def run(home: Path, *arguments: str, url: str = "http://127.0.0.1:1", token: str = "t" * 32) -> Any:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LLORCH_")}
    env = kept | {"LLORCH_HOME": str(home), "LLORCH_URL": url, "LLORCH_API_TOKEN": token}
    command = [sys.executable, "-P", "-m", "llama_orch.cli", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=LIMIT_S, check=False)


def put(client: httpx.Client, number: int, **fields: Any) -> httpx.Response:
    content = {"number": number, "text": "x" * (number * 7919 % 60_000)}
    return client.post("/v1/artifacts", json={"kind": "other", "content": content, "tags": ["t"], **fields})


def is_whole(client: httpx.Client, digest: str, number: int) -> bool:
    answer = client.get(f"/v1/artifacts/{digest}")
    return answer.status_code == 200 and answer.json()["content"]["number"] == number


@pytest.mark.spec("HP-ART-1", "HP-ART-2", "HP-ART-3", "HP-ART-4", "HP-SEC-7")
def test_artifacts_and_transcripts_of_a_real_service(tmp_path: Path) -> None:
    """put, ls, get, tree and rm by command; a transcript; the token in none of it; all below the home folder."""
    with live_service(SMALL | {"tasks": {"keep_transcripts": True}}) as service, open_client(service) as client:

        def artifacts(*arguments: str) -> Any:
            return run(service.home, "artifacts", *arguments, url=service.url, token=service.token)

        (tmp_path / "plan.json").write_text('{"steps": ["read", "write"]}')
        (tmp_path / "leak.json").write_text(json.dumps({"seen": service.token}))
        plan = artifacts("put", str(tmp_path / "plan.json"), "--kind", "plan").stdout.strip()
        frames = finish(client, max_tokens=5)
        task_id = frames[0].data["task_id"]
        tag = f"task:{task_id}"
        until(lambda: len(client.get("/v1/artifacts", params={"tag": tag}).json()["items"]) == 1)
        listed = artifacts("ls", "--json").stdout
        trace, first = json.loads(listed)["items"]
        assert (trace["kind"], first["id"]) == ("trace", plan)
        whole = json.loads(artifacts("get", trace["id"], "--json").stdout)
        assert whole["content"]["tokens"] == [frame.data["t"] for frame in frames if frame.event == "token"]
        assert whole["content"]["end"] == frames[-1].data
        assert plan in artifacts("tree", plan).stdout
        leak = artifacts("put", str(tmp_path / "leak.json"))
        assert (leak.returncode, "holds the token of this service" in leak.stderr) == (1, True)
        unsigned = [entry["artifact_id"] for entry in service.log() if "is unsigned" in entry["message"]]
        assert unsigned == [plan, trace["id"]]
        files = [path for path in service.home.rglob("*") if path.is_file() and path.name != "token"]
        assert {plan, trace["id"]} <= {path.name for path in files}
        assert not any(service.token.encode() in path.read_bytes() for path in files)
        assert artifacts("rm", plan).returncode == 0
        assert client.get(f"/v1/artifacts/{plan}").status_code == 404


@pytest.mark.spec("HP-CTL-5")
def test_a_full_disk_is_507_and_the_service_goes_on(small_disk: Path, fill: Callable[[Path], Path]) -> None:
    with live_service(SMALL, home=small_disk / "home") as service, open_client(service) as client:
        kept = put(client, 1).json()["id"]
        filler = fill(small_disk)
        for number in range(2, 30):  # what was set aside already is used up first
            answer = put(client, number * 10)
            if answer.status_code != 201:
                break
        body = answer.json()
        assert (answer.status_code, body["code"], body["retriable"]) == (507, "STORAGE_UNAVAILABLE", True)
        assert str(small_disk) not in body["message"]
        assert finish(client, max_tokens=3)[-1].event == "end"  # tasks need no disk
        assert is_whole(client, kept, 1)
        filler.unlink()
        assert put(client, 999).status_code == 201


@pytest.mark.spec("HP-CTL-5")
def test_a_backup_of_a_running_service_and_its_restore(tmp_path: Path) -> None:
    home, copy = tmp_path / "home", tmp_path / "copy"
    with live_service(SMALL, home=home) as service, open_client(service) as client:
        kept = {put(client, number).json()["id"]: number for number in range(5)}
        done = run(home, "backup", str(copy))
        assert (done.returncode, done.stderr.strip()) == (0, "backed up 5 artifacts")
        for digest in kept:
            client.delete(f"/v1/artifacts/{digest}").raise_for_status()
    done = run(home, "restore", str(copy))
    assert (done.returncode, done.stderr.strip()) == (0, "restored 5 artifacts")
    with live_service(SMALL, home=home) as service, open_client(service) as client:
        assert all(is_whole(client, digest, number) for digest, number in kept.items())
    again = run(home, "backup", str(copy))
    assert (again.returncode, "is not empty" in again.stderr) == (1, True)


@pytest.mark.spec("HP-CTL-5")
def test_nothing_is_restored_under_a_running_service(tmp_path: Path) -> None:
    """The home folder's lock is held by whoever serves on it."""
    import fcntl

    home = tmp_path / "home"
    home.mkdir()
    with (home / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = run(home, "restore", str(tmp_path))
    assert (done.returncode, "stop it first" in done.stderr) == (1, True)
