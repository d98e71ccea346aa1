"""kill -9 at random moments (HP-CTL-5): what was answered is there and whole; what was not is whole or absent."""

from __future__ import annotations

import itertools
import os
import random
import select
import signal
import time
from pathlib import Path
from typing import TextIO

import pytest

from llama_orch.contract.models import Artifact, ArtifactKind
from llama_orch.errors import NotFound
from llama_orch.stores.artifacts import ArtifactStore
from tests.stores.conftest import opened

KILLS = 60
SEED = 7


def write_for_ever(home: Path, first: int, say: TextIO) -> None:
    """Says a line once an artifact is stored, and before and after it deletes one, which is every other."""
    with opened(home) as store:
        store.sweep()
        for number in itertools.count(first):
            ref = store.put(an_artifact(number)).ref
            print("put", number, ref.id, file=say, flush=True)
            if number % 2:
                print("deletes", number, ref.id, file=say, flush=True)
                store.delete(ref.id)
                print("deleted", number, ref.id, file=say, flush=True)


def write_and_kill(home: Path, first: int, lines: int, then_s: float) -> list[list[str]]:
    """What a writer said that was killed so many seconds behind its first so many lines, in mid-write as a rule."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            with open(theirs, "w") as say:
                write_for_ever(home, first, say)
        finally:
            os._exit(1)
    os.close(theirs)
    with open(ours, "rb", buffering=0) as file:
        said = b""
        while said.count(b"\n") < lines:
            said += file.read(4096) or b""
        end = time.monotonic() + then_s
        while (left := end - time.monotonic()) > 0 and select.select([file], [], [], left)[0]:
            said += file.read(4096)
        os.kill(pid, signal.SIGKILL)
        said += file.read()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL, "the writer ended by itself"
    return [line.split() for line in said[: said.rfind(b"\n") + 1].decode().splitlines()]


def an_artifact(number: int) -> Artifact:
    content = {"number": number, "text": "x" * (number * 7919 % 60_000)}
    return Artifact(kind=ArtifactKind.OTHER, content=content, tags=["all", f"n{number}"])


def listed(store: ArtifactStore, tag: str = "all") -> list[str]:
    return [ref.id for ref in store.list(kind=None, tag=tag, parent=None, limit=200, cursor=None).items]


def is_there(store: ArtifactStore, digest: str, number: int) -> bool:
    try:
        whole = store.get(digest)
    except NotFound:
        return False
    assert whole.content == an_artifact(number).content
    assert listed(store, f"n{number}") == [digest]
    return True


@pytest.mark.spec("HP-CTL-5")
def test_what_was_answered_survives_kill_9(tmp_path: Path) -> None:
    dice = random.Random(SEED)
    kept: dict[str, int] = {}
    following = 0
    for _ in range(KILLS):
        said = write_and_kill(tmp_path, following, dice.randrange(1, 12), dice.uniform(0.0, 0.03))
        last = {digest: (act, int(number)) for act, number, digest in said}
        with opened(tmp_path) as store:
            for digest, (act, number) in last.items():
                following = max(following, number + 1)
                if act == "deletes":  # it was killed in the middle: whole or absent
                    act = "put" if is_there(store, digest, number) else "deleted"
                assert is_there(store, digest, number) == (act == "put"), (act, number)
                if act == "put":
                    kept[digest] = number
            # What was stored and not answered: one at most, and whole.
            unknown = set(listed(store)) - set(kept)
            assert len(unknown) <= 1
            for digest in unknown:
                kept[digest] = store.get(digest).content["number"]
                assert is_there(store, digest, kept[digest])
                following = max(following, kept[digest] + 1)
            store.sweep()
            assert {file.name for file in (tmp_path / "artifacts").rglob("*") if file.is_file()} == set(kept)
            for digest in list(kept)[:-100]:  # the list stays one page
                store.delete(digest)
                del kept[digest]
    with opened(tmp_path) as store:
        assert set(listed(store)) == set(kept)
        assert all(is_there(store, digest, number) for digest, number in kept.items())
