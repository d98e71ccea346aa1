"""Model files for tests of what is loaded where, a way to hold up a load, and what the service says of it all.

Each file is a model of its own to the service. By prediction one takes some 490 MiB of a card (4 slots of 2048 tokens),
nearly all of it what any process takes there; of a card the service gives away all but 256 MiB.
"""

from __future__ import annotations

import fcntl
import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx

import llama_orch
from tests.live.client import submit

MIB = 1 << 20
ROOM_FOR_ONE, ROOM_FOR_TWO = 1000 * MIB, 1400 * MIB
TINY = (Path(llama_orch.__file__).parent / "models" / "tiny.gguf").read_bytes()
CTX_TRAINED = 2048
# How a GGUF names its architecture: the key, the type (text), the length and the name.
_NAMED = b"general.architecture\x08\0\0\0\x05\0\0\0\0\0\0\0llama"
_TRAINED = b"llama.context_length\x04\0\0\0"

# No end of text within the limit: a story that goes on while the test acts.
LONG = {"max_tokens": 1900, "sampling": {"temperature": 1.5, "top_k": 0, "top_p": 1.0, "min_p": 0.0}}


def a_model(folder: Path, name: str, content: bytes = TINY) -> Path:
    """A model file that no other has the digest of."""
    path = folder / f"{name}.gguf"
    path.write_bytes(content + name.encode())
    return path


def of_unknown_architecture() -> bytes:
    """A header that is sound, of an architecture that llama.cpp has never heard of."""
    assert _NAMED in TINY
    return TINY.replace(_NAMED, _NAMED.replace(b"llama", b"llamx")).replace(b"llama.", b"llamx.")


def trained_with(ctx: int) -> bytes:
    """The same model, as if it had been trained with so much context."""
    assert _TRAINED + CTX_TRAINED.to_bytes(4, "little") in TINY
    return TINY.replace(_TRAINED + CTX_TRAINED.to_bytes(4, "little"), _TRAINED + ctx.to_bytes(4, "little"))


def digest(path: Path) -> str:
    return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


def ref(path: Path) -> str:
    return f"file:{path}"


@contextmanager
def held_load(model: Path) -> Iterator[Callable[[], None]]:
    """The stand-in of `llama-server` waits before it loads this model, until the result is called or the block ends."""
    with Path(f"{model}.gate").open("w") as gate:
        fcntl.flock(gate, fcntl.LOCK_EX)
        yield partial(fcntl.flock, gate, fcntl.LOCK_UN)


def simulated(**sizes: int) -> list[dict[str, Any]]:
    return [{"id": name, "backend": "simulated", "vram_bytes": size} for name, size in sizes.items()]


def long_task(client: httpx.Client, prompts: int = 64, **body: Any) -> str:
    """A task that runs for as long as the test needs it to; its id."""
    task_id: str = submit(client, inputs=["Once upon a time"] * prompts, **LONG, **body)["task_id"]
    return task_id


def task(client: httpx.Client, task_id: str) -> dict[str, Any]:
    answer: dict[str, Any] = client.get(f"/v1/tasks/{task_id}").json()
    return answer


def health(client: httpx.Client, pool_id: str) -> dict[str, Any]:
    answer: dict[str, Any] = client.get(f"/v1/pools/{pool_id}/health").json()
    return answer


def pools(client: httpx.Client) -> dict[str, dict[str, Any]]:
    """By model reference."""
    return {pool["model"]: pool for pool in client.get("/v1/pools").json()["items"]}


def is_ready(client: httpx.Client, reference: str) -> bool:
    pool = pools(client).get(reference)
    return pool is not None and bool(pool["ready"])


def states(client: httpx.Client, pool_id: str) -> dict[str, str]:
    """Of the pool's replicas, by their devices."""
    return {"+".join(r["devices"]): r["state"] for r in health(client, pool_id)["replicas"]}


def devices(client: httpx.Client) -> dict[str, dict[str, Any]]:
    return {device["id"]: device for device in client.get("/v1/capabilities").json()["devices"]}


def reserved(client: httpx.Client) -> dict[str, int]:
    return {name: device["vram_reserved_bytes"] for name, device in devices(client).items()}


Sample = tuple[dict[str, str], float]


def samples(client: httpx.Client, name: str) -> list[Sample]:
    """What /metrics has under this name: labels and value."""
    found = re.findall(rf"^{name}(?:\{{(.*)\}})? (\S+)$", client.get("/metrics").text, re.MULTILINE)
    return [(dict(re.findall(r'(\w+)="([^"]*)"', labels)), float(value)) for labels, value in found]


def total(client: httpx.Client, name: str, **labels: str) -> int:
    """The sum of those that have these labels."""
    return round(sum(value for found, value in samples(client, name) if labels.items() <= found.items()))


def loads(client: httpx.Client) -> int:
    return total(client, "latency_load_ms_count")
