"""Disks that are full or read-only under a running service: the catalog answers with a typed error and nothing else
suffers; once the disk does again, so does the catalog."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.hub import a_hub
from tests.live.client import finish, live_frames, open_client, submit, until
from tests.live_service import LiveService, live_service
from tests.stores.conftest import fill, small_disk

__all__ = ["fill", "small_disk"]
pytestmark = [pytest.mark.xdist_group("death"), pytest.mark.spec("HP-CTL-5")]

MODELS = "/v1/catalog/models"
FULL = (507, "STORAGE_UNAVAILABLE", True)


@contextmanager
def serving(home: Path, roots: Path, **env: str) -> Iterator[tuple[LiveService, httpx.Client]]:
    """No model is needed to fill a disk: the pool's worker is a simulated one."""
    settings: dict[str, Any] = {
        "devices": [{"id": "gpu0", "backend": "simulated", "vram_bytes": 1 << 34}],
        "pools": [{"id": "default", "engine": "simulated", "slots": 2}],
        "catalog": {"file_roots": [str(roots)]},
        "policy": {"outbound": {"allow_private_addresses": True}},
    }
    with live_service(settings, home=home, env=env) as service, open_client(service) as client:
        yield service, client


def enter(client: httpx.Client, name: str, source: str, **more: Any) -> httpx.Response:
    return client.post(MODELS, json={"id": name, "source_url": source, **more})


def said(answer: httpx.Response) -> tuple[int, str, bool]:
    return answer.status_code, answer.json()["code"], answer.json()["retriable"]


def model(client: httpx.Client, name: str) -> Any:
    return client.get(f"{MODELS}/{name}").json()


def is_fetched(client: httpx.Client, name: str) -> str:
    until(lambda: model(client, name)["fetch"]["state"] in ("done", "failed"))
    state: str = model(client, name)["fetch"]["state"]
    return state


def until_full(client: httpx.Client, name: str) -> httpx.Response:
    """Write until it is refused: what SQLite has set aside already is used up first."""
    for number in range(500):
        answer = enter(client, f"{name}-{number}", "builtin:tiny", tags=["x" * 128] * 60)
        if answer.status_code != 201:
            return answer
    raise AssertionError("the disk did not get full")


def test_the_catalog_on_a_disk_that_gets_full(small_disk: Path, fill: Callable[[Path], Path], tmp_path: Path) -> None:
    """Create, state, verify, delete and fetch are refused and change nothing; streams go on, and what was known is
    answered. Once there is room everything works again."""
    (tmp_path / "here.gguf").write_bytes(b"x" * 1000)
    with a_hub(b"GGUF" * 1000) as hub, serving(small_disk / "home", tmp_path, HF_ENDPOINT=hub.url) as (_, client):
        enter(client, "here", f"file:{tmp_path / 'here.gguf'}").raise_for_status()
        enter(client, "there", "hf:org/repo/there.gguf").raise_for_status()
        task_id = submit(client, max_tokens=40)["task_id"]
        with live_frames(client, task_id) as frames:
            next(frames)
            filler = fill(small_disk)
            refused = until_full(client, "full")
            assert said(refused) == FULL
            assert str(small_disk) not in refused.text
            refused_name = f"full-{len(client.get(MODELS, params={'limit': 200}).json()['items']) - 2}"
            for answer in (
                client.post(f"{MODELS}/here/state", json={"state": "Retired"}),
                client.post(f"{MODELS}/here/verify"),
                client.post(f"{MODELS}/there/fetch"),
                client.delete(f"{MODELS}/here"),
            ):
                assert said(answer) == FULL, answer.request.url
            assert (model(client, "here")["state"], model(client, "there")["fetch"]["state"]) == ("Active", "none")
            assert model(client, "here")["verification"]["state"] == "unverified"
            assert client.get(f"{MODELS}/{refused_name}").status_code == 404
            assert [frame.event for frame in frames][-1] == "end"  # tasks need no disk
        filler.unlink()
        assert enter(client, refused_name, "builtin:tiny").status_code == 201
        client.post(f"{MODELS}/here/verify").raise_for_status()
        until(lambda: model(client, "here")["verification"]["outcome"] == "passed")
        client.post(f"{MODELS}/here/state", json={"state": "Retired"}).raise_for_status()
        # The disk has room again for the catalog, and far less than a fetch leaves free for others.
        client.post(f"{MODELS}/there/fetch").raise_for_status()
        assert is_fetched(client, "there") == "failed"
        assert "free some space" in model(client, "there")["fetch"]["error"]
        assert finish(client, max_tokens=3)[-1].event == "end"


def test_a_folder_of_models_that_is_read_only(tmp_path: Path) -> None:
    """A fetch fails and says why; the rest of the catalog goes on, and so does the fetch once the folder does."""
    home = tmp_path / "home"
    (home / "models").mkdir(parents=True)
    home.chmod(0o700)
    with a_hub(b"GGUF" * 1000) as hub, serving(home, tmp_path, HF_ENDPOINT=hub.url) as (_, client):
        enter(client, "there", "hf:org/repo/there.gguf").raise_for_status()
        with read_only(home / "models"):
            client.post(f"{MODELS}/there/fetch").raise_for_status()
            assert is_fetched(client, "there") == "failed"
            assert "cannot be written to" in model(client, "there")["fetch"]["error"]
            assert str(home) not in model(client, "there")["fetch"]["error"]
            assert enter(client, "other", "builtin:tiny").status_code == 201
            assert finish(client, max_tokens=3)[-1].event == "end"
        client.post(f"{MODELS}/there/fetch").raise_for_status()
        assert is_fetched(client, "there") == "done"


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """For everybody, root too: a bind of the folder on itself."""
    bind = ["mount", "--bind", str(folder), str(folder)]
    if (done := subprocess.run(bind, capture_output=True, text=True, check=False)).returncode:
        pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


LOGGING = """
import io, logging
from llama_orch.observe import logs

class Disk(io.StringIO):
    is_full = False
    def write(self, text):
        if self.is_full:
            raise OSError(28, "No space left on device")
        return super().write(text)

disk = Disk()
logs.set_up("info", "json", ["hunter2"], disk)
for disk.is_full in (False, True, True, False, False):
    logging.getLogger("a").error("hunter2 %s", "x")
print(disk.getvalue(), end="")
"""


def test_a_log_that_cannot_be_written_stops_nothing() -> None:
    """What there was to say is lost and counted, and is not printed in another way, with the secrets in it."""
    done = subprocess.run([sys.executable, "-c", LOGGING], capture_output=True, text=True, check=True)
    told = [json.loads(line)["message"] for line in done.stdout.splitlines()]
    assert told == [
        "[redacted] x",
        "[redacted] x",
        "2 lines of the log could not be written and are lost",
        "[redacted] x",
    ]
    assert done.stderr == ""
    with open("/dev/full", "w") as full:  # where standard error itself takes nothing
        program = "import logging, sys; from llama_orch.observe import logs; logs.set_up('info', 'json', []);"
        program += "logging.getLogger('a').error('x'); print('went on')"
        done = subprocess.run(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=full, text=True, check=False
        )
    assert done.stdout == "went on\n"
