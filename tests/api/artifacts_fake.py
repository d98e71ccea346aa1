"""Artifacts in memory, for the service that is a fake."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec
from msgspec import UNSET

from llama_orch.contract.models import Artifact, ArtifactKind, ArtifactList, ArtifactRef, StoredArtifact
from llama_orch.errors import NotFound, StorageUnavailable

FULL_DISK = "full-disk"  # a tag that finds no room


class FakeArtifacts:
    """`forever` is the id of one that is there whatever happens."""

    def __init__(self, forever: str) -> None:
        self.forever = forever
        self.stored: dict[str, StoredArtifact] = {}
        self.asked: list[dict[str, Any]] = []

    async def put_artifact(self, artifact: Artifact) -> tuple[ArtifactRef, bool]:
        tags = [] if artifact.tags is UNSET else artifact.tags
        if FULL_DISK in tags:
            raise StorageUnavailable("the store is full; free some space and repeat")
        if artifact.parent is not None and artifact.parent not in self.stored:
            raise NotFound("the artifact that was to be the parent is not there")
        text = msgspec.json.encode(artifact.content, order="sorted")
        digest = hashlib.sha256(text).hexdigest()
        is_new = digest not in self.stored
        if is_new:
            self.stored[digest] = StoredArtifact(
                id=digest,
                kind=artifact.kind,
                digest=f"sha256:{digest}",
                created_ms=1_767_268_800_000,
                tags=sorted(set(tags)),
                parent=artifact.parent,
                size_bytes=len(text),
                content=artifact.content,
                metadata={} if artifact.metadata is UNSET else artifact.metadata,
            )
        return _ref(self.stored[digest]), is_new

    async def list_artifacts(
        self, *, kind: ArtifactKind | None, tag: str | None, parent: str | None, limit: int, cursor: str | None
    ) -> ArtifactList:
        self.asked.append({"kind": kind, "tag": tag, "parent": parent, "limit": limit, "cursor": cursor})
        found = [
            _ref(one)
            for one in reversed(self.stored.values())
            if kind in (None, one.kind) and parent in (None, one.parent) and (tag is None or tag in one.tags)
        ][int(cursor or 0) :]
        more = str(int(cursor or 0) + limit) if len(found) > limit else None
        return ArtifactList(items=found[:limit], next_cursor=more)

    async def get_artifact(self, artifact_id: str) -> StoredArtifact:
        if artifact_id == self.forever:
            return AN_ARTIFACT
        if artifact_id not in self.stored:
            raise NotFound("there is no such artifact")
        return self.stored[artifact_id]

    async def delete_artifact(self, artifact_id: str) -> None:
        await self.get_artifact(artifact_id)
        self.stored.pop(artifact_id, None)


def _ref(artifact: StoredArtifact) -> ArtifactRef:
    return ArtifactRef(**{name: getattr(artifact, name) for name in ArtifactRef.__struct_fields__})


AN_ARTIFACT = StoredArtifact(
    id="ab" * 32,
    kind=ArtifactKind.OTHER,
    digest="sha256:" + "ab" * 32,
    created_ms=0,
    tags=[],
    parent=None,
    size_bytes=2,
    content={},
    metadata={},
)
