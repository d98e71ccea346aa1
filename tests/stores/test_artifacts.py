"""What is stored, found, read and deleted."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from llama_orch.contract.models import Artifact, ArtifactKind
from llama_orch.errors import InvalidParams, NotFound, PayloadTooLarge, StorageUnavailable
from llama_orch.stores.artifacts import CONTENT_BYTES_MAX, METADATA_BYTES_MAX, ArtifactStore
from tests.stores.conftest import SECRET, opened


def an_artifact(number: int = 0, kind: str = "other", **fields: Any) -> Artifact:
    return Artifact(kind=ArtifactKind(kind), **{"content": {"number": number}, **fields})


def ids(store: ArtifactStore, **asked: Any) -> list[str]:
    nothing = {"kind": None, "tag": None, "parent": None, "limit": 200, "cursor": None}
    return [ref.id for ref in store.list(**(nothing | asked)).items]


def blobs(home: Path) -> list[Path]:
    return sorted(file for file in (home / "artifacts").rglob("*") if file.is_file())


@pytest.mark.spec("HP-ART-1")
def test_an_artifact_is_read_as_it_was_stored(store: ArtifactStore) -> None:
    parent = store.put(an_artifact(1, "plan")).ref
    given = an_artifact(
        2,
        "diff",
        tags=["b", "a", "b"],
        parent=parent.id,
        metadata={"z": 1, "a": [None]},
        content={"t": "wörld", "n": 1.5},
    )
    ref, is_new = store.put(given)
    text = '{"n":1.5,"t":"wörld"}'.encode()
    assert is_new
    assert (ref.id, ref.digest, ref.size_bytes) == (
        hashlib.sha256(text).hexdigest(),
        f"sha256:{hashlib.sha256(text).hexdigest()}",
        len(text),
    )
    assert (ref.kind, ref.tags, ref.parent, ref.created_ms) == ("diff", ["a", "b"], parent.id, 1_767_268_801_000)
    whole = store.get(ref.id)
    assert (whole.content, whole.metadata) == ({"t": "wörld", "n": 1.5}, {"z": 1, "a": [None]})
    assert (whole.id, whole.tags, whole.parent) == (ref.id, ref.tags, ref.parent)


@pytest.mark.spec("HP-ART-1")
def test_equal_content_has_one_id_and_the_first_one_stands(store: ArtifactStore) -> None:
    first = store.put(an_artifact(1, "plan", tags=["a"], content={"b": 1, "a": 2.0}))
    again = store.put(an_artifact(2, "diff", tags=["x"], content={"a": 2, "b": 1}, metadata={"m": 1}))
    assert (again.ref, again.is_new) == (first.ref, False)
    assert store.get(first.ref.id).metadata == {}
    assert ids(store) == [first.ref.id]


@pytest.mark.spec("HP-ART-1")
def test_a_parent_that_is_not_there_is_not_found_and_nothing_is_stored(store: ArtifactStore, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="parent is not there"):
        store.put(an_artifact(1, parent="ab" * 32))
    assert (ids(store), blobs(tmp_path)) == ([], [])


@pytest.mark.spec("HP-ART-1")
def test_artifacts_are_listed_newest_first_by_kind_tag_and_parent_page_by_page(store: ArtifactStore) -> None:
    root = store.put(an_artifact(0, "plan")).ref.id
    made = [
        store.put(an_artifact(n, "diff" if n % 2 else "trace", tags=["all", f"n{n}"], parent=root)).ref.id
        for n in range(1, 7)
    ]
    newest_first = made[::-1]
    assert ids(store) == [*newest_first, root]
    assert ids(store, kind=ArtifactKind.DIFF) == newest_first[1::2]
    assert ids(store, tag="all") == newest_first
    assert ids(store, tag="n3") == [made[2]]
    assert ids(store, parent=root) == newest_first
    assert ids(store, parent=root, kind=ArtifactKind.TRACE, tag="n2") == [made[1]]
    assert ids(store, tag="al") == ids(store, parent="root") == []
    asked: dict[str, Any] = {"kind": None, "tag": "all", "parent": None, "limit": 4}
    page = store.list(**asked, cursor=None)
    store.put(an_artifact(99, tags=["all"]))  # what comes meanwhile does not move the pages
    rest = store.list(**asked, cursor=page.next_cursor)
    assert [ref.id for ref in (*page.items, *rest.items)] == newest_first
    assert rest.next_cursor is None


@pytest.mark.parametrize("cursor", ["x", "-1", "1 OR 1", "٣", "1" * 19])
def test_a_cursor_that_nobody_gave_out_is_refused(store: ArtifactStore, cursor: str) -> None:
    with pytest.raises(InvalidParams, match="start again without it"):
        store.list(kind=None, tag=None, parent=None, limit=1, cursor=cursor)


@pytest.mark.spec("HP-ART-1")
def test_a_deleted_artifact_is_gone_from_the_disk_and_its_children_stay(store: ArtifactStore, tmp_path: Path) -> None:
    root = store.put(an_artifact(0)).ref
    child = store.put(an_artifact(1, parent=root.id, tags=["t"])).ref
    store.delete(root.id)
    assert [file.name for file in blobs(tmp_path)] == [child.id]
    assert store.get(child.id).parent == root.id
    assert ids(store, parent=root.id) == [child.id]
    for act in (store.get, store.delete):
        with pytest.raises(NotFound):
            act(root.id)
    again = store.put(an_artifact(0))
    assert again.is_new
    assert ids(store) == [again.ref.id, child.id]


@pytest.mark.spec("HP-ART-1")
def test_what_is_too_large_is_refused_with_both_figures(store: ArtifactStore) -> None:
    room = CONTENT_BYTES_MAX - len('{"t":""}')
    assert store.put(an_artifact(content={"t": "x" * room})).ref.size_bytes == CONTENT_BYTES_MAX
    with pytest.raises(PayloadTooLarge) as caught:
        store.put(an_artifact(content={"t": "x" * (room + 1)}))
    assert caught.value.details == {"size_bytes": CONTENT_BYTES_MAX + 1, "size_bytes_max": CONTENT_BYTES_MAX}
    with pytest.raises(PayloadTooLarge, match="`metadata`"):
        store.put(an_artifact(metadata={"t": "x" * METADATA_BYTES_MAX}))


@pytest.mark.spec("HP-SEC-7")
@pytest.mark.parametrize(
    "fields",
    [
        {"content": {"log": [f"Authorization: Bearer {SECRET}\n"]}},
        {"content": {SECRET: 1}},
        {"metadata": {"token": SECRET}},
        {"tags": [SECRET]},
    ],
)
def test_the_services_token_is_in_no_artifact(store: ArtifactStore, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidParams, match="holds the token of this service") as caught:
        store.put(an_artifact(**fields))
    assert SECRET not in caught.value.message
    assert ids(store) == []


def test_files_are_for_their_user_alone(store: ArtifactStore, tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        digest = store.put(an_artifact()).ref.id
    finally:
        os.umask(old)
    file = tmp_path / "artifacts" / digest[:2] / digest
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (file, file.parent, file.parent.parent)]
    assert modes == [0o600, 0o700, 0o700]


@pytest.mark.spec("HP-CTL-5")
def test_a_damaged_or_lost_blob_is_no_answer_and_storing_it_again_mends_it(
    store: ArtifactStore, tmp_path: Path
) -> None:
    digest = store.put(an_artifact(1)).ref.id
    (file,) = blobs(tmp_path)
    for damage in (lambda: file.write_bytes(b'{"number":2}'), file.unlink):
        damage()
        with pytest.raises(StorageUnavailable, match="lost or damaged on the disk") as caught:
            store.get(digest)
        assert str(tmp_path) not in caught.value.message
        assert not store.put(an_artifact(1)).is_new
        assert store.get(digest).content == {"number": 1}


@pytest.mark.spec("HP-CTL-5")
def test_what_interrupted_writes_and_deletions_left_is_swept(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        kept = store.put(an_artifact(1)).ref.id
    folder = tmp_path / "artifacts" / kept[:2]
    orphan = folder / (kept[:2] + "0" * 62)
    for left in (orphan, folder / ".0123456789abcdef", folder / "notes.txt"):
        left.write_bytes(b"left")
    outside = tmp_path / "outside"
    outside.write_bytes(b"not ours")
    (folder / "link").symlink_to(outside)
    with opened(tmp_path) as store:
        assert store.sweep() == 4
        assert store.sweep() == 0
        assert store.get(kept).content == {"number": 1}
    assert [file.name for file in blobs(tmp_path)] == [kept]
    assert outside.read_bytes() == b"not ours"


def test_two_processes_may_use_one_store(store: ArtifactStore, tmp_path: Path) -> None:
    """A command's own server works beside the service."""
    with opened(tmp_path) as other:
        first = store.put(an_artifact(1)).ref.id
        assert other.get(first).content == {"number": 1}
        other.delete(first)
        with pytest.raises(NotFound):
            store.get(first)
        assert ids(store) == []


def test_an_id_is_no_path(store: ArtifactStore) -> None:
    for hostile in ("../../etc/passwd", "a' OR '1'='1", "\0", "A" * 64, "%"):
        with pytest.raises(NotFound):
            store.get(hostile)
        assert ids(store, parent=hostile) == ids(store, tag=hostile) == []
