"""Fetches of the catalog's models: what is on the disk after a deletion, a kill or a defect, and who may write."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
from collections.abc import Awaitable, Callable, Coroutine
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from llama_orch.contract.config import OutboundSettings, Settings
from llama_orch.contract.models import CatalogModelRequest, ErrorCode, FetchState
from llama_orch.errors import LlorchError
from llama_orch.models.catalog import CatalogBook, Entry, Finding
from llama_orch.models.digest import Digests
from llama_orch.models.references import ModelNotFound
from llama_orch.observe.catalog import CatalogJournal
from llama_orch.observe.metrics import Metrics
from llama_orch.outbound.door import Outbound
from llama_orch.policy.rules import Rules
from llama_orch.runtime import fetches as fetches_module
from llama_orch.runtime.catalog import Catalog
from llama_orch.runtime.fetches import Fetches, FetchReader
from llama_orch.runtime.hashing import HashingProcess, examine_with
from llama_orch.runtime.records import Unkept
from tests.hub import Hub, a_hub
from tests.live.client import until

pytestmark = pytest.mark.spec("HP-CTL-1", "HP-CTL-5")

CONTENT = bytes(range(256)) * 1000
DIGEST = f"sha256:{sha256(CONTENT).hexdigest()}"
LIMIT_S = 30.0


async def digest(path: Path) -> str:
    return await asyncio.to_thread(lambda: f"sha256:{sha256(path.read_bytes()).hexdigest()}")


class Kept:
    """Stands for the catalog: what it was told."""

    def __init__(self) -> None:
        self.files: dict[str, str] = {}
        self.failures: dict[str, ErrorCode] = {}

    async def fetched(self, entry: Entry, file: str, finding: Finding) -> None:
        self.files[entry.id] = file

    async def fetch_failed(self, entry: Entry, failure: LlorchError) -> None:
        self.failures[entry.id] = failure.code


class Bench:
    """Fetches from one hub into one folder, and who is told."""

    def __init__(self, hub: Hub, folder: Path, examine: Any = None) -> None:
        self.kept = Kept()
        self.folder = folder / "models"
        outbound = Outbound(Rules.of(OutboundSettings(allow_private_addresses=True)), lambda _: None)
        env = {"HF_ENDPOINT": hub.url}
        self.fetches = Fetches(self.folder, outbound, examine or examine_with(digest), self.kept, lambda: 0.0, env)

    def start(self, entry: Entry) -> None:
        def spawn(work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
            return asyncio.ensure_future(work)

        self.fetches.start(entry, spawn)

    async def ended(self, entry: Entry) -> None:
        task = self.fetches.of(entry)
        assert task is not None
        assert task.task is not None
        await task.task

    def files(self) -> set[str]:
        return {path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file()}


def an_entry(name: str = "story", **declared: Any) -> Entry:
    request = CatalogModelRequest(id=name, source_url=f"hf:org/repo/{name}.gguf", **declared)
    return Entry(number=1, declared=request, created_s=0.0)


def play(act: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(LIMIT_S):
            await act()

    asyncio.run(limited())


@pytest.mark.parametrize("declared", [{}, {"digest": DIGEST}])
def test_nothing_stays_of_a_fetch_whose_model_is_deleted(tmp_path: Path, declared: dict[str, Any]) -> None:
    """Neither its part nor the note of what was there of it; who looks on is told, and the next fetch goes on."""
    with a_hub(CONTENT, hold_after=100_000) as hub:

        async def act() -> None:
            bench, entry = Bench(hub, tmp_path), an_entry(**declared)
            bench.start(entry)
            await asyncio.to_thread(hub.held.wait)
            fetch = bench.fetches.of(entry)
            assert fetch is not None
            reader = FetchReader(fetch.view, fetch, lambda: None)
            assert b"running" in (await reader.batch() or b"")
            await bench.fetches.stop(entry)
            assert bench.files() == set()
            frames = [frame async for frame in _rest(reader)]
            assert b"failed" in frames[-1]
            assert b"deleted" in frames[-1]
            other = an_entry("other")
            bench.start(other)
            await bench.ended(other)
            assert bench.files() == {bench.kept.files["other"]}

        play(act)


async def _rest(reader: FetchReader) -> Any:
    while (frame := await reader.batch()) is not None:
        yield frame


def test_a_whole_file_that_nobody_has_written_down_goes_too(tmp_path: Path) -> None:
    """Of this model alone: another's name may begin alike."""
    with a_hub(CONTENT) as hub:

        async def act() -> None:
            bench = Bench(hub, tmp_path)
            bench.folder.mkdir()
            for name in ("a", "a-b", f"a-{'0' * 16}"):
                (bench.folder / f"{name}-{'1' * 16}.gguf").touch()
            await bench.fetches.stop(an_entry("a"))
            assert bench.files() == {f"a-b-{'1' * 16}.gguf", f"a-{'0' * 16}-{'1' * 16}.gguf"}

        play(act)


def test_a_sweep_leaves_what_entries_have_and_may_go_on_with(tmp_path: Path) -> None:
    with a_hub(CONTENT, faults=["truncate", 404]) as hub:

        async def act() -> None:
            bench, part = Bench(hub, tmp_path), an_entry("part")
            bench.start(part)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("llama_orch.runtime.download.BACKOFF_S", 0.0)
                await bench.ended(part)
            whole = Entry(number=2, declared=an_entry("whole").declared, created_s=0.0, file="whole-1.gguf")
            (bench.folder / "whole-1.gguf").touch()
            known = bench.files()
            assert len(known) == 3
            for name in ("gone-1.gguf", "partial/1.part", "partial/1.json", "partial/1.new"):
                (bench.folder / name).touch()
            assert bench.fetches.sweep([part, whole]) == 4
            assert bench.files() == known
            assert bench.fetches.sweep([]) == 3
            assert bench.files() == set()

        play(act)


def test_a_kill_behind_the_last_step_costs_no_second_fetch(tmp_path: Path) -> None:
    """The file has its name, and the catalog does not know: what was declared tells that it is the one."""
    with a_hub(CONTENT) as hub:

        async def act() -> None:
            bench, entry = Bench(hub, tmp_path), an_entry(digest=DIGEST)
            bench.folder.mkdir()
            whole = bench.folder / f"story-{DIGEST[7:23]}.gguf"
            for content, asked in ((CONTENT, 0), (CONTENT[:-1], 1)):
                whole.write_bytes(content)
                bench.fetches.sweep([entry])
                bench.start(entry)
                await bench.ended(entry)
                assert len(hub.asked_for()) == asked
                assert whole.read_bytes() == CONTENT
                assert bench.fetches.view(entry).received_bytes == len(CONTENT)

        play(act)


def test_two_processes_do_not_write_to_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second waits until the first has ended, however that ends."""
    monkeypatch.setattr(fetches_module, "OTHERS_S", 0.01)
    lock, tries = fetches_module._locked, list[bool]()
    monkeypatch.setattr(fetches_module, "_locked", lambda descriptor: tries.append(lock(descriptor)) or tries[-1])
    with a_hub(CONTENT) as hub:

        async def act() -> None:
            bench, entry = Bench(hub, tmp_path), an_entry()
            (bench.folder / "partial").mkdir(parents=True)
            other = os.open(bench.folder / "partial", os.O_RDONLY)
            fcntl.flock(other, fcntl.LOCK_EX)
            bench.start(entry)
            await asyncio.to_thread(until, lambda: len(tries) >= 3)
            assert bench.fetches.view(entry).state is FetchState.QUEUED
            assert hub.heard == []
            os.close(other)
            await bench.ended(entry)
            assert bench.kept.files.keys() == {"story"}

        play(act)


def test_a_defect_in_a_fetch_ends_that_fetch_alone(tmp_path: Path) -> None:
    """And says so: whoever waits for it must not wait for ever."""

    async def broken(*_: Any) -> Finding:
        raise ZeroDivisionError

    with a_hub(CONTENT) as hub:

        async def act() -> None:
            bench, entry = Bench(hub, tmp_path, broken), an_entry()
            bench.start(entry)
            await bench.ended(entry)
            assert bench.fetches.view(entry).state is FetchState.FAILED
            assert bench.kept.failures == {"story": ErrorCode.INTERNAL}

        play(act)


@pytest.mark.spec("HP-CTL-4")
def test_a_verification_that_looked_before_the_file_came_says_nothing_of_it() -> None:
    """It ends after the fetch, and what the fetch has found stands."""
    asked, looked, found = asyncio.Event(), asyncio.Event(), Finding(at_s=1.0, digest=DIGEST, size_bytes=len(CONTENT))

    async def glance(reference: str) -> Any:
        asked.set()
        await looked.wait()
        raise ModelNotFound("it was not there")

    async def act() -> None:
        tasks: list[asyncio.Task[None]] = []

        def spawn(work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
            tasks.append(asyncio.ensure_future(work))
            return tasks[-1]

        async def settled(*_: Any) -> None:
            """Nobody waits."""

        journal = CatalogJournal(Metrics(lambda: ()))
        catalog = Catalog(CatalogBook(), Unkept(), glance, examine_with(digest), Settings(), lambda: 0.0, journal)
        catalog.bind(spawn, lambda: None, settled)
        await catalog.create(an_entry().declared)
        entry = await catalog.verify("story")
        await asked.wait()
        catalog.book.put(structs.replace(entry, file="story-1.gguf", finding=found))
        looked.set()
        await asyncio.gather(*tasks)
        now = await catalog.get("story")
        assert (now.file, now.finding, now.is_due) == ("story-1.gguf", found, False)

    play(act)


def test_where_no_process_can_be_started_the_verification_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no reason to end the service."""

    async def refused(*_: Any, **__: Any) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    path = tmp_path / "a.gguf"
    path.write_bytes(CONTENT)

    async def act() -> None:
        finding = await HashingProcess(Digests(tmp_path / "digests.json"))(path, lambda *_: None, lambda: 0.0)
        assert finding.digest is None
        assert "no process could read the file" in str(finding.error)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", refused)
    play(act)
