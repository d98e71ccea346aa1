"""Models that are none and workers that die again and again: told in a sentence, and at nobody else's cost."""

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

import llama_orch
from tests.live.client import LIMIT_S, finish, is_running, kill, open_client, until, workers
from tests.live.conftest import POOLS
from tests.live_service import live_service

pytestmark = pytest.mark.xdist_group("death")

TINY = (Path(llama_orch.__file__).parent / "models" / "tiny.gguf").read_bytes()
# How a GGUF names its architecture: the key, the type (text), the length and the name.
NAMED = b"general.architecture\x08\0\0\0\x05\0\0\0\0\0\0\0llama"
KILLS_MAX = 10
LOSSES_ALLOWED = 6  # in a row


def _half(whole: bytes) -> bytes:
    return whole[: len(whole) // 2]


def _nothing(_: bytes) -> bytes:
    return b""


def _renamed(whole: bytes) -> bytes:
    """Another architecture in name only."""
    assert NAMED in whole
    return whole.replace(NAMED, NAMED.replace(b"llama", b"llamx"))


def _unknown(whole: bytes) -> bytes:
    """A header that is sound, of an architecture that llama.cpp has never heard of."""
    return _renamed(whole).replace(b"llama.", b"llamx.")


@pytest.mark.spec("HP-PLC-7")
@pytest.mark.parametrize(
    ("spoil", "reasons"),
    [
        pytest.param(_half, ["the file is truncated"] * 2, id="cut in half"),
        pytest.param(_nothing, ["the header is truncated"] * 2, id="empty"),
        pytest.param(_renamed, ["lacks llamx.context_length", "this model is 'llamx'"], id="another architecture"),
    ],
)
def test_a_file_that_is_no_model_is_refused(
    tmp_path: Path, spoil: Callable[[bytes], bytes], reasons: list[str]
) -> None:
    """On both engines: before anything listens, with one sentence for each pool, exit code 1 and no traceback."""
    model = tmp_path / "model.gguf"
    model.write_bytes(spoil(TINY))
    pools = [{"id": engine, "engine": engine, "model": f"file:{model}"} for engine in ("llamacpp", "ctransformers")]
    ended = _serve(tmp_path, pools)
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert "Traceback" not in ended.stderr
    problems = [line for line in ended.stderr.splitlines() if not line.startswith("{")]
    assert [problem.split(": ")[:2] for problem in problems] == [
        ["error", "pool llamacpp"],
        ["error", "pool ctransformers"],
    ]
    assert all(reason in problem for reason, problem in zip(reasons, problems, strict=True))


def _serve(folder: Path, pools: list[dict[str, Any]]) -> subprocess.CompletedProcess[str]:
    config = folder / "config.yaml"
    config.write_text(json.dumps({"pools": pools}))
    command = [sys.executable, "-P", "-m", "llama_orch.cli", "serve", "--port", "0", "--config", str(config)]
    env = {**os.environ, "LLORCH_HOME": str(folder / "home")}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=LIMIT_S, check=False)


@pytest.mark.spec("HP-PLC-7")
def test_an_architecture_that_llama_cpp_does_not_know(tmp_path: Path) -> None:
    """Only the engine can tell: the pool's health has its words, and the other pool serves."""
    model = tmp_path / "model.gguf"
    model.write_bytes(_unknown(TINY))
    pools = [{"id": "default", "model": f"file:{model}"}, POOLS[1]]
    with live_service({"pools": pools}) as service, open_client(service) as client:
        until(lambda: "unknown model architecture: 'llamx'" in (_health(client, "default")["last_error"] or ""))
        assert not _health(client, "default")["ready"]
        assert finish(client, engine="ctransformers", max_tokens=4)[-1].event == "end"


@pytest.mark.spec("HP-PLC-7", "HP-CTL-2")
def test_a_worker_that_is_killed_again_and_again_is_given_up() -> None:
    """While idle, ten times if need be: it comes back up to six times in a row, then the replica is failed and says
    why, until the pool is reloaded. Service and other pool stay up, and the worker of that pool is the same all the
    time."""
    with live_service({"pools": POOLS}) as service, open_client(service) as client:
        until(lambda: all(_health(client, pool["id"])["ready"] for pool in POOLS))
        bystander = workers(service)["ctransformers"]
        kills = 0
        killed = None

        def is_settled() -> bool:
            state = _replica(client)["state"]
            return state == "failed" or (state == "ready" and workers(service).get("llamacpp") not in (None, killed))

        while kills < KILLS_MAX and _replica(client)["state"] != "failed":
            killed = workers(service)["llamacpp"]
            kill(killed)
            kills += 1
            until(is_settled)
        assert kills == LOSSES_ALLOWED + 1
        health = _health(client, "default")
        assert (health["live"], health["ready"], _replica(client)["restarts"]) == (False, False, LOSSES_ALLOWED)
        assert "SIGKILL" in _replica(client)["last_error"]
        assert "SIGKILL" in health["last_error"]
        assert "llamacpp" not in workers(service)
        assert client.post("/v1/pools/default/reload", json={"new_model_ref": "builtin:tiny"}).status_code == 202
        until(lambda: _health(client, "default")["ready"])
        assert finish(client, engine="llamacpp", max_tokens=4)[-1].event == "end"
        assert finish(client, engine="ctransformers", max_tokens=4)[-1].event == "end"
        assert workers(service)["ctransformers"] == bystander
        assert is_running(service.pid)


def _health(client: httpx.Client, pool_id: str) -> dict[str, Any]:
    health: dict[str, Any] = client.get(f"/v1/pools/{pool_id}/health").json()
    return health


def _replica(client: httpx.Client) -> dict[str, Any]:
    replica: dict[str, Any] = _health(client, "default")["replicas"][0]
    return replica
