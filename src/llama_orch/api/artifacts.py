"""Artifacts: store, list, read, delete."""

from __future__ import annotations

from http import HTTPStatus

import msgspec

from llama_orch.api.answer import Answer
from llama_orch.api.bodies import Bodies, LargeAnswer
from llama_orch.api.service import Service
from llama_orch.contract.models import Artifact, ArtifactKind, ArtifactList


class Artifacts:
    _service: Service
    _answers: Bodies

    async def create_artifact(self, *, body: Artifact) -> Answer:
        ref, is_new = await self._service.put_artifact(body)
        return Answer(ref, {}, HTTPStatus.CREATED if is_new else HTTPStatus.OK)

    async def list_artifacts(
        self, *, kind: ArtifactKind | None, tag: str | None, parent: str | None, limit: int, cursor: str | None
    ) -> ArtifactList:
        return await self._service.list_artifacts(kind=kind, tag=tag, parent=parent, limit=limit, cursor=cursor)

    async def get_artifact(self, *, id: str) -> LargeAnswer:
        return LargeAnswer(msgspec.json.encode(await self._service.get_artifact(id.lower())), self._answers)

    async def delete_artifact(self, *, id: str) -> None:
        await self._service.delete_artifact(id.lower())
