"""The service as a process of its own, for benchmarks that speak to it over HTTP."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

TOKEN = "benchmark-0123456789abcdefghijklmnop"
SAID = "listening on "
LOG_CHARS = 2000


class ServiceFailed(Exception):
    """It did not start."""


@dataclass(frozen=True)
class Served:
    """A service that listens. Its pools may still be loading."""

    client: httpx.AsyncClient
    pid: int


@asynccontextmanager
async def a_service(configuration: Mapping[str, Any], home: Path) -> AsyncIterator[Served]:
    """Start it with this configuration on a free port of loopback, its home and its log in `home`; end it, and with it
    its workers, with the block."""
    config, log_path = _files(configuration, home)
    command = [sys.executable, "-P", "-m", "llama_orch.cli", "serve", "--port", "0", "--lifeline"]
    env = {**os.environ, "LLORCH_HOME": str(home), "LLORCH_API_TOKEN": TOKEN}
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package has its bytecode
    with log_path.open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *command, "--config", str(config), env=env, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            stderr=log,
        )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        said = (await process.stdout.readline()).decode()
        if not said.startswith(SAID):
            raise ServiceFailed(f"the service did not start:\n{log_path.read_text(errors='replace')[-LOG_CHARS:]}")
        async with httpx.AsyncClient(
            base_url=said.removeprefix(SAID).strip(),
            headers={"Authorization": f"Bearer {TOKEN}"},
            trust_env=False,
            timeout=60,
        ) as client:
            yield Served(client, process.pid)
    finally:
        process.stdin.close()
        await process.wait()


async def until_ready(client: httpx.AsyncClient, pool_id: str = "default") -> None:
    while not (await client.get(f"/v1/pools/{pool_id}")).json()["ready"]:  # noqa: ASYNC110
        await asyncio.sleep(0.05)


def _files(configuration: Mapping[str, Any], home: Path) -> tuple[Path, Path]:
    """The configuration, written, and where its log goes."""
    home.mkdir(parents=True, exist_ok=True)
    config = home / "config.yaml"
    config.write_text(json.dumps(configuration))  # JSON is YAML
    return config, home / "service.log"
