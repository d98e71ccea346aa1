"""One file from a hub that misbehaves: what is asked for, what is taken up again, and how it ends."""

from __future__ import annotations

import asyncio
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llama_orch.contract.config import OutboundSettings
from llama_orch.errors import InvalidParams, LlorchError, PolicyDenied, StorageUnavailable, UpstreamFailed
from llama_orch.outbound.door import Outbound
from llama_orch.policy.rules import Rules
from llama_orch.runtime import download
from llama_orch.runtime.download import ATTEMPTS_MAX, Download, url_of
from tests.hub import Hub, a_hub
from tests.stores.conftest import fill, small_disk

__all__ = ["fill", "small_disk"]

CONTENT = bytes(range(256)) * 4096  # a MiB
SOURCE = "hf:org/repo/folder/story.gguf"
SYNC_BYTES = 100_000


class Run:
    """Downloads from one hub into one folder; `waits` are the seconds between attempts."""

    def __init__(self, hub: Hub, folder: Path) -> None:
        self.hub = hub
        self.partial = folder / "story.part"
        self.waits: list[float] = []
        self.seen: list[tuple[int, int | None]] = []

    def once(self, source: str = SOURCE, *, closed: bool = False, **more: Any) -> None:
        outbound = Outbound(Rules.of(OutboundSettings(allow_private_addresses=not closed)), lambda _: None)
        env = {"HF_ENDPOINT": self.hub.url, "HF_TOKEN": "hf_secret"}

        async def run() -> None:
            one = Download(
                outbound, source, self.partial, lambda *how: self.seen.append(how), env=env, sleep=self.sleep, **more
            )
            await one.run()

        asyncio.run(run())

    async def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)


@pytest.fixture(autouse=True)
def many_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "SYNC_BYTES", SYNC_BYTES)


def test_a_file_comes_over_a_redirect_to_another_host(tmp_path: Path) -> None:
    """The hub's token goes to the hub and to nobody else; the progress ends with the whole."""
    with a_hub(CONTENT) as hub:
        run = Run(hub, tmp_path)
        run.once()
    assert run.partial.read_bytes() == CONTENT
    (first, at_hub), (second, at_files) = hub.heard
    assert (first, second) == ("/org/repo/resolve/main/folder/story.gguf", f"/files{first}")
    assert at_hub["authorization"] == "Bearer hf_secret"
    assert "authorization" not in at_files
    assert run.seen[0] == (0, len(CONTENT))
    assert run.seen[-1] == (len(CONTENT), len(CONTENT))


def test_what_broke_off_is_taken_up_where_it_ended(tmp_path: Path) -> None:
    """Again and again, with the entity tag as the condition."""
    with a_hub(CONTENT, faults=["truncate", "reset", "truncate"]) as hub:
        run = Run(hub, tmp_path)
        run.once()
    assert run.partial.read_bytes() == CONTENT
    half = len(CONTENT) // 2
    assert hub.asked_for() == [None, f"bytes={half}-", f"bytes={half}-", f"bytes={half + half // 2}-"]
    assert hub.heard[-1][1]["if-range"] == '"v1"'


def test_another_process_takes_it_up(tmp_path: Path) -> None:
    """Only what is noted to be on the disk counts: what is behind it may be a hole."""
    with a_hub(CONTENT, faults=["truncate", *[500] * 2]) as hub:
        run = Run(hub, tmp_path)
        with pytest.raises(LlorchError, match="500"):
            run.once()
        with run.partial.open("ab") as file:
            file.write(b"\0" * 1000)
        hub.faults.clear()
        Run(hub, tmp_path).once()
    assert run.partial.read_bytes() == CONTENT
    assert hub.asked_for()[-1] == f"bytes={len(CONTENT) // 2}-"


@pytest.mark.parametrize(
    "fields", [{"has_ranges": False}, {"etag": None}, {"etag": 'W/"weak"'}], ids=["no ranges", "no tag", "weak tag"]
)
def test_what_cannot_be_taken_up_begins_anew(tmp_path: Path, fields: dict[str, Any]) -> None:
    with a_hub(CONTENT, faults=["truncate"], **fields) as hub:
        run = Run(hub, tmp_path)
        run.once()
    assert run.partial.read_bytes() == CONTENT


def test_a_file_that_was_changed_begins_anew(tmp_path: Path) -> None:
    """Half of the old and half of the new are no file."""
    with a_hub(CONTENT, faults=["truncate", 404]) as hub:
        run = Run(hub, tmp_path)
        with pytest.raises(LlorchError, match="404"):
            run.once()
        hub.content, hub.etag = CONTENT[::-1] + b"more", '"v2"'
        run.once()
    assert run.partial.read_bytes() == hub.content


def test_another_part_than_was_asked_for_is_not_taken(tmp_path: Path) -> None:
    with a_hub(CONTENT, faults=["truncate", "elsewhere"]) as hub:
        run = Run(hub, tmp_path)
        run.once()
    assert run.partial.read_bytes() == CONTENT


def test_a_whole_file_is_not_fetched_again(tmp_path: Path) -> None:
    """The service ended between the last byte and the rest."""
    with a_hub(CONTENT) as hub:
        run = Run(hub, tmp_path)
        run.once()
        run.once()
    assert run.partial.read_bytes() == CONTENT
    assert hub.asked_for() == [None, f"bytes={len(CONTENT)}-"]


def test_who_is_busy_is_given_the_time_that_he_asks_for(tmp_path: Path) -> None:
    with a_hub(CONTENT, faults=[429, 503]) as hub:
        run = Run(hub, tmp_path)
        run.once()
    assert run.waits == [7.0, 7.0]
    assert run.partial.read_bytes() == CONTENT


def test_it_is_given_up_in_the_end(tmp_path: Path) -> None:
    """After so many attempts that brought nothing."""
    with a_hub(CONTENT, faults=["reset"] * 100) as hub:
        run = Run(hub, tmp_path)
        with pytest.raises(UpstreamFailed, match="given up"):
            run.once()
    assert len(hub.asked_for()) == ATTEMPTS_MAX + 1
    assert run.waits == sorted(run.waits)


def test_who_sends_too_slowly_does_not_hold_up_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte now and then is no progress: it is given up in the end."""
    monkeypatch.setattr(download, "PACE_S", 0.0)
    monkeypatch.setattr(download, "PACE_BYTES", len(CONTENT))
    with a_hub(CONTENT, slow_after=0) as hub:
        run = Run(hub, tmp_path)
        with pytest.raises(UpstreamFailed, match="too slowly"):
            run.once()
        assert len(hub.asked_for()) <= ATTEMPTS_MAX + 1


def test_more_than_was_said_is_not_taken(tmp_path: Path) -> None:
    """The body has the length that its head says, whatever comes behind it."""
    with a_hub(CONTENT, faults=["more"]) as hub:
        run = Run(hub, tmp_path)
        run.once(size_bytes=None)
    assert len(run.partial.read_bytes()) == len(CONTENT) - 1


@pytest.mark.parametrize("declared", [len(CONTENT) - 1, len(CONTENT) + 1])
def test_another_size_than_was_declared_is_refused_before_it_comes(tmp_path: Path, declared: int) -> None:
    with a_hub(CONTENT) as hub:
        run = Run(hub, tmp_path)
        with pytest.raises(LlorchError, match="were declared"):
            run.once(size_bytes=declared)
    assert len(hub.asked_for()) == 1


def test_what_has_no_room_is_refused_before_it_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "FILE_BYTES_MAX", len(CONTENT) - 1)
    with a_hub(CONTENT) as hub:
        run = Run(hub, tmp_path)
        with pytest.raises(StorageUnavailable, match="no room"):
            run.once()
    assert not run.partial.exists()


@pytest.mark.parametrize("how", ["chunked", "unsaid"])
def test_a_file_whose_size_is_not_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """It comes where its end can be told from a break, and no further than there is room."""
    with a_hub(CONTENT, length=how) as hub:
        run = Run(hub, tmp_path)
        if how == "unsaid":
            with pytest.raises(LlorchError, match="declare its size"):
                run.once()
        size = len(CONTENT) if how == "unsaid" else None
        run.once(size_bytes=size)
        assert run.partial.read_bytes() == CONTENT
        run.partial.unlink()
        monkeypatch.setattr(download, "FILE_BYTES_MAX", len(CONTENT) // 2)
        with pytest.raises(StorageUnavailable, match="no room"):
            run.once(size_bytes=size)
    assert not run.partial.exists() or run.partial.stat().st_size <= len(CONTENT) // 2 + SYNC_BYTES


def test_what_a_write_did_not_take_is_written_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that has room for a part takes that part, and may have room for the rest a moment later."""

    class Halves(io.FileIO):
        def write(self, data: Any, /) -> int:
            return super().write(bytes(data)[: max(1, len(data) // 2)])

    def opened(self: Download, start: int) -> Any:
        return Halves(os.open(self._partial, os.O_RDWR | os.O_CREAT), "r+b")

    monkeypatch.setattr(Download, "_opened", opened)
    with a_hub(CONTENT) as hub:
        run = Run(hub, tmp_path)
        run.once()
    assert run.partial.read_bytes() == CONTENT


def test_a_disk_that_gets_full_in_the_middle(
    tmp_path: Path, small_disk: Path, fill: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was written in part counts for nothing; once there is room it is taken up, and nothing is missing."""
    monkeypatch.setattr(download, "SPARE_BYTES", -(1 << 40))  # another program takes the room after we have looked
    filler = fill(small_disk)
    os.truncate(filler, filler.stat().st_size - len(CONTENT) // 2)
    with a_hub(CONTENT) as hub:
        run = Run(hub, small_disk)
        with pytest.raises(OSError, match="No space left"):
            run.once()
        filler.unlink()
        run.once()
    assert run.partial.read_bytes() == CONTENT
    assert hub.asked_for()[1] is not None


def test_nothing_goes_past_the_outbound_policy(tmp_path: Path) -> None:
    """Addresses of this machine are closed by default."""
    with a_hub(CONTENT) as hub:
        run = Run(hub, tmp_path)
        with pytest.raises(PolicyDenied):
            run.once(closed=True)
    assert hub.heard == []


@pytest.mark.parametrize(
    "source", ["hf:a/b", "hf:a/b/../c", "hf:a/b/.git", "hf:a//b/c", "hf:a/b/c?d", "hf:@evil.example/a/b", "hf:a/b/c d"]
)
def test_what_is_no_file_of_the_hub_is_refused(source: str) -> None:
    with pytest.raises(InvalidParams, match="hf:org/repo"):
        url_of(source, {})


def test_the_hub_is_the_one_that_everybody_knows() -> None:
    """Without a token nothing says who asks."""
    assert url_of(SOURCE, {}) == ("https://huggingface.co/org/repo/resolve/main/folder/story.gguf", {})
    assert url_of("https://a.example/m.gguf", {"HF_TOKEN": "x"}) == ("https://a.example/m.gguf", {})
