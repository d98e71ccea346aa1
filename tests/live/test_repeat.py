"""`llama-orch run --repeat` on both engines: with a server that was restarted, with another profile behind its pool,
and with a server for the length of each command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.live.client import ENGINES, LIMIT_S, open_client, until
from tests.live_service import TOKEN, LiveService, live_service

pytestmark = [pytest.mark.spec("HP-DET-2"), pytest.mark.xdist_group("determinism")]

POOLS = [{"id": name, "engine": name, "ctx": 512} for name in ENGINES]


def run(home: Path, *arguments: str, **env: str) -> tuple[int, str, str]:
    """The command with a home of its own; a server by LLORCH_URL."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("LLORCH_")}
    command = [sys.executable, "-P", "-m", "llama_orch.cli", "run", *arguments]
    environment = inherited | {"LLORCH_HOME": str(home)} | env
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    return done.returncode, done.stdout, done.stderr


def against(service: LiveService) -> dict[str, str]:
    with open_client(service) as client:
        until(lambda: all(pool["ready"] for pool in client.get("/v1/pools").json()["items"]))
    return {"LLORCH_URL": service.url, "LLORCH_API_TOKEN": service.token}


def id_of(err: str) -> str:
    return err.rpartition("to repeat it: llama-orch run --repeat ")[2].strip()


def test_a_run_is_repeated_on_another_server(tmp_path: Path) -> None:
    """Byte for byte, on each engine, after a restart, though the seed was chosen by the service. With another profile
    behind the pool it differs, and that is said."""
    ids, first = {}, {}
    with live_service({"pools": POOLS}) as service:
        env = against(service)
        for engine in ENGINES:
            code, first[engine], err = run(
                tmp_path, "Once upon a time", "--engine", engine, "--max-tokens", "32", **env
            )
            assert code == 0, err
            ids[engine] = id_of(err)
    with live_service({"pools": POOLS}) as service:
        env = against(service)
        for engine in ENGINES:
            code, again, err = run(tmp_path, "--repeat", ids[engine], **env)
            assert (code, again) == (0, first[engine]), err
            assert "the bytes agree" in err
    greedy = [pool | {"sampler_profile_version": "greedy-v1"} for pool in POOLS]
    with live_service({"pools": greedy}) as service:
        env = against(service)
        for engine in ENGINES:
            code, _, err = run(tmp_path, "--repeat", ids[engine], **env)
            assert code == 1, err
            assert "  sampler profile: v1 then, greedy-v1 now\n" in err


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_is_repeated_without_a_server(tmp_path: Path, engine: str) -> None:
    """Each command has a server of its own."""
    config = tmp_path / "config.yaml"
    config.write_text(f"pools: [{{id: default, engine: {engine}, ctx: 512}}]\n")
    env = {"LLORCH_CONFIG": str(config), "LLORCH_API_TOKEN": TOKEN}
    code, first, err = run(tmp_path / "home", "Once upon a time", "--max-tokens", "32", **env)
    assert code == 0, err
    code, again, err = run(tmp_path / "home", "--repeat", id_of(err), **env)
    assert (code, again) == (0, first), err
    assert "the bytes agree" in err
    assert "starting one for this command" in err
