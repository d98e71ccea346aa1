"""What a task may name, and what becomes of it when that is no model, too large, or somewhere else."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.live.client import finish, open_client, stream, submit, until
from tests.live.models import (
    CTX_TRAINED,
    MIB,
    ROOM_FOR_TWO,
    TINY,
    a_model,
    health,
    of_unknown_architecture,
    pools,
    ref,
    simulated,
    trained_with,
)
from tests.live_service import live_service

pytestmark = pytest.mark.xdist_group("model files")

# By prediction: a slot of 2048 tokens fits, one of 4096 does not.
ROOM_FOR_LITTLE = (256 + 470) * MIB
HOUSE = {"id": "default", "keep_alive_ms": 60_000, "slots": 1, "ctx": 512}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("disk") / "models"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def client(root: Path) -> Iterator[httpx.Client]:
    """A service on a card that holds two models, with files below one root."""
    settings = {
        "devices": simulated(card=ROOM_FOR_TWO),
        "pools": [HOUSE],
        "catalog": {"file_roots": [str(root)]},
        "on_demand": {"min_residency_ms": 0},
    }
    with live_service(settings) as service, open_client(service) as client:
        yield client


def refusal(client: httpx.Client, reference: str, **body: Any) -> tuple[int, str, str]:
    """Status, code and message of a task that is not admitted."""
    answer = client.post("/v1/tasks", json={"model_ref": reference, "prompt": "Once", "max_tokens": 4, **body})
    said = answer.json()
    return answer.status_code, said.get("code", "admitted"), said.get("message", "")


@pytest.mark.spec("HP-PLC-8", "HP-SEC-7")
def test_the_rest_of_the_disk_is_not_shown(client: httpx.Client, root: Path) -> None:
    """Outside of the roots, whichever way it is put, the answer is the same whether or not the file is there."""
    outside = a_model(root.parent, "outside")
    (root / "link.gguf").symlink_to(outside)
    (root / "dangling.gguf").symlink_to(root.parent / "absent.gguf")
    (root / "up").symlink_to(root.parent)
    pairs = [
        (f"file:{outside}", f"file:{root.parent}/absent.gguf"),
        (f"file:{root}/../outside.gguf", f"file:{root}/../absent.gguf"),
        (f"file:{root}/link.gguf", f"file:{root}/dangling.gguf"),
        (f"file:{root}/up/outside.gguf", f"file:{root}/up/absent.gguf"),
        ("file:/etc/passwd", "file:/etc/no-such-file"),
        ("file:outside.gguf", "file:absent.gguf"),
        (f"file:~/../..{outside}", f"file:~/../..{root.parent}/absent.gguf"),
    ]
    for there, absent in pairs:
        status, code, message = refusal(client, there)
        assert (status, code) == (404, "NOT_FOUND")
        assert refusal(client, absent) == (404, "NOT_FOUND", message.replace(repr(there), repr(absent)))


@pytest.mark.spec("HP-PLC-8", "HP-ERR-1")
def test_what_is_no_file_is_not_found(client: httpx.Client, root: Path) -> None:
    """Below the root: an absent file, a folder, a pipe, a loop of links, and names that no file can have."""
    (root / "folder").mkdir()
    os.mkfifo(root / "pipe")
    (root / "loop").symlink_to(root / "loop")
    names = ["absent.gguf", "folder", "pipe", "loop", "loop/model.gguf", "n" * 300, "nul\0.gguf", "folder/.."]
    for name in [*names, "bad\ud800.gguf"]:
        body = b'{"model_ref": "file:%s", "prompt": "Once"}' % _escaped(f"{root}/{name}")
        answer = client.post("/v1/tasks", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code in (400, 404), (name, answer.text)
        assert answer.json()["code"] in ("NOT_FOUND", "INVALID_PARAMS"), name


def _escaped(text: str) -> bytes:
    """As JSON text, lone surrogates included."""
    return "".join(c if c.isalnum() or c in "/.-_" else f"\\u{ord(c):04x}" for c in text).encode()


@pytest.mark.spec("HP-PLC-7", "HP-PLC-8")
@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("text", b"This is a story, and no model.\n" * 100, "not a GGUF"),
        ("half", TINY[: len(TINY) // 2], "truncated"),
        ("empty", b"", "truncated"),
    ],
    ids=["text", "half", "empty"],
)
def test_a_file_that_is_no_model(client: httpx.Client, root: Path, name: str, content: bytes, reason: str) -> None:
    """Refused with the reason, and a file of that name that is a model is served as soon as it is there."""
    path = root / f"{name}.gguf"
    path.write_bytes(content)
    status, code, message = refusal(client, ref(path))
    assert (status, code) == (400, "INVALID_PARAMS")
    assert reason in message
    a_model(root, name)
    assert finish(client, model_ref=ref(path), max_tokens=4)[-1].event == "end"


@pytest.mark.spec("HP-PLC-7", "HP-PLC-8", "HP-ERR-4")
def test_a_model_that_the_engine_does_not_know(client: httpx.Client, root: Path) -> None:
    """Only the load can tell. Who waits for it hears of it after few tries, newcomers at once, in the engine's words;
    meanwhile another model answers."""
    strange = a_model(root, "strange", of_unknown_architecture())
    waiting = submit(client, model_ref=ref(strange), max_tokens=4)["task_id"]
    assert finish(client, max_tokens=4)[-1].event == "end"
    last = stream(client, waiting)[-1]
    assert (last.event, last.data["code"]) == ("error", "POOL_UNAVAILABLE")
    assert "unknown model architecture: 'llamx'" in last.data["message"]
    status, code, message = refusal(client, ref(strange))
    assert (status, code) == (503, "POOL_UNAVAILABLE")
    assert "unknown model architecture: 'llamx'" in message
    state = health(client, pools(client)[ref(strange)]["id"])
    assert (state["live"], [replica["vram_reserved_bytes"] for replica in state["replicas"]]) == (False, [0])
    assert finish(client, max_tokens=4)[-1].event == "end"


@pytest.mark.spec("HP-ADM-4", "HP-PLC-5")
def test_more_context_than_the_model_was_trained_with(client: httpx.Client, root: Path) -> None:
    """Refused with both numbers."""
    status, code, message = refusal(client, ref(a_model(root, "short")), ctx=CTX_TRAINED + 1)
    assert (status, code) == (400, "INVALID_PARAMS")
    assert str(CTX_TRAINED) in message
    assert str(CTX_TRAINED + 1) in message


@pytest.mark.spec("HP-PLC-5", "HP-PLC-8")
def test_only_a_context_that_nobody_asked_for_is_lowered(tmp_path: Path) -> None:
    """On a card with little room: a model that was trained with much gets as much as fits; who asks for more is told
    what it would take and what there is, who asks for less is served, and the service goes on."""
    model = a_model(tmp_path, "wide", trained_with(1 << 20))
    settings = {
        "devices": simulated(card=ROOM_FOR_LITTLE),
        "pools": [HOUSE],
        "catalog": {"file_roots": [str(tmp_path)]},
        "on_demand": {"min_residency_ms": 0},
    }
    with live_service(settings) as service, open_client(service) as client:
        assert finish(client, model_ref=ref(model), max_tokens=4)[-1].event == "end"
        assert pools(client)[ref(model)]["ctx"] == 2048
        for ctx in (4096, 1 << 20):
            answer = client.post("/v1/tasks", json={"model_ref": ref(model), "prompt": "Once", "ctx": ctx})
            assert (answer.status_code, answer.json()["code"]) == (400, "INVALID_PARAMS")
            assert answer.json()["details"]["need_bytes"]["card"] > ROOM_FOR_LITTLE - 256 * MIB
            assert f"1 slot of {ctx} tokens needs" in answer.json()["message"]
        assert finish(client, model_ref=ref(model), ctx=256, max_tokens=4)[-1].event == "end"
        until(lambda: client.get("/healthz").status_code == 200)
