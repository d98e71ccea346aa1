"""Where the catalog's entries are kept."""

from __future__ import annotations

from typing import Protocol

from llama_orch.models.catalog import Entry


class Records(Protocol):
    """Where entries are kept."""

    async def load(self) -> list[Entry]:
        """All of them. Raises StorageUnavailable."""

    async def put(self, entry: Entry) -> None:
        """It is on the disk when this returns. Raises StorageUnavailable."""

    async def remove(self, model_id: str) -> None: ...


class Unkept:
    """For a service that keeps nothing: rehearsals, and tests of other things."""

    async def load(self) -> list[Entry]:
        return []

    async def put(self, entry: Entry) -> None:
        """There is no disk."""

    async def remove(self, model_id: str) -> None:
        """There is no disk."""
