"""The models that somebody has entered, as the service remembers them, and the names under which they are found.

What was declared stays as it was sent; beside it stands what was found. Nothing here does any I/O.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import msgspec

from llama_orch.contract.models import CatalogModelRequest, GgufInfo, ModelState


class Sight(msgspec.Struct, frozen=True, kw_only=True):
    """The file as it was seen last, without reading it as a whole."""

    size_bytes: int
    gguf: GgufInfo | None


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """What a verification found. `key` changes when the file does (models/digest.py); `error` is a sentence, where the
    file could not be read. `at_s`: seconds since the epoch."""

    at_s: float
    key: str | None = None
    digest: str | None = None
    size_bytes: int | None = None
    error: str | None = None


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One model of the catalog. `is_due`: a verification was asked for and has not come to its end. `created_s`:
    seconds since the epoch."""

    number: int
    declared: CatalogModelRequest
    created_s: float
    state: ModelState = ModelState.ACTIVE
    sight: Sight | None = None
    finding: Finding | None = None
    is_due: bool = False
    file: str | None = None  # what was fetched: its name in the service's folder of models
    is_fetch_due: bool = False  # a fetch was asked for and has not come to its end

    @property
    def is_fetched(self) -> bool:
        """Whether its file comes from elsewhere."""
        return self.source.startswith(("hf:", "https:"))

    @property
    def is_absent(self) -> bool:
        """Whether its file is still to be fetched."""
        return self.is_fetched and self.file is None

    @property
    def id(self) -> str:
        return self.declared.id

    @property
    def source(self) -> str:
        return self.declared.source_url

    @property
    def digest(self) -> str | None:
        """As declared, else as found."""
        return self.declared.digest or (None if self.finding is None else self.finding.digest)

    @property
    def is_retired(self) -> bool:
        return self.state is ModelState.RETIRED

    @property
    def names(self) -> frozenset[str]:
        """What leads to this entry and to nothing else that could be meant."""
        return frozenset((self.id, self.source, *([] if self.digest is None else [self.digest])))


class CatalogBook:
    """All entries, in memory, in the order in which they were made."""

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self._entries = {entry.id: entry for entry in sorted(entries, key=lambda entry: entry.number)}
        self._paths: dict[str, Path] = {}
        self._last = max((entry.number for entry in self._entries.values()), default=0)

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(list(self._entries.values()))

    def get(self, model_id: str) -> Entry | None:
        return self._entries.get(model_id)

    def find(self, reference: str) -> Entry | None:
        """The entry that a reference names: by its id, by its digest, by its source. Of several the one that may be
        served, and of those the oldest."""
        if (entry := self._entries.get(reference)) is not None:
            return entry
        if reference.startswith("sha256:"):
            found = [entry for entry in self if entry.digest == reference]
        else:
            found = [entry for entry in self if entry.source == reference]
        return min(found, key=lambda entry: (entry.is_retired, entry.number), default=None)

    def source_of(self, reference: str) -> str:
        """Where the file of a catalog id or a digest is; any other reference says so itself."""
        if ":" not in reference or reference.startswith("sha256:"):
            entry = self.find(reference)
            return reference if entry is None else entry.source
        return reference

    def covering(self, path: Path | None, names: Sequence[str]) -> list[Entry]:
        """Entries of the model that has this file, or one of these names."""
        return [
            entry
            for entry in self
            if not entry.names.isdisjoint(names) or (path is not None and self._paths.get(entry.id) == path)
        ]

    def path(self, entry: Entry) -> Path | None:
        """Its file, where one was seen."""
        return self._paths.get(entry.id)

    def next_number(self) -> int:
        return self._last + 1

    def put(self, entry: Entry) -> None:
        self._entries[entry.id] = entry
        self._last = max(self._last, entry.number)

    def put_path(self, entry: Entry, path: Path | None) -> None:
        if path is None:
            self._paths.pop(entry.id, None)
        else:
            self._paths[entry.id] = path

    def remove(self, entry: Entry) -> None:
        del self._entries[entry.id]
        self._paths.pop(entry.id, None)
