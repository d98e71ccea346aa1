"""The models that a service can load, by reference, and what each of them would take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from llama_orch.contract.config import OpenaiServerSettings
from llama_orch.engines.base import Offer
from llama_orch.engines.remote.discovery import CTX_GUESS, SLOTS_GUESS, offer_of
from llama_orch.models.catalog import CatalogBook
from llama_orch.models.gguf import GgufError, GgufHeader, read_gguf_header
from llama_orch.models.kv_shape import kv_bytes_per_token
from llama_orch.models.memory import LoadSettings, memory_need
from llama_orch.models.references import ModelNotFound, resolve
from llama_orch.remote_references import SCHEME, split_reference

# Tokens of context per slot, slots, backend -> bytes in total; None where nothing can be told.
Need = Callable[[int, int, str], int | None]


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """What is taken for true of a model on a server until that has been asked."""

    slots: int
    ctx: int
    offer: Offer


@dataclass(frozen=True, slots=True)
class Model:
    """One model file, or a model elsewhere. `ctx_trained` is in tokens, None where it is not stated."""

    reference: str
    path: Path | None
    ctx_trained: int | None
    need: Need
    kv_bytes_per_token: Callable[[int], int] = lambda ctx: 0  # at a context of so many tokens
    elsewhere: Elsewhere | None = None  # then it is no file


class Library(Protocol):
    """Where references lead."""

    def look(self, reference: str) -> Model:
        """The model behind the reference. Raises ModelNotFound. Reads a file's header: some milliseconds."""

    def is_open(self, reference: str) -> bool:
        """Whether anybody with the token may name it, wherever it lies."""


class FileLibrary:
    """Models that are files of this machine."""

    def is_open(self, reference: str) -> bool:
        return reference.startswith("builtin:")

    def look(self, reference: str) -> Model:
        path = resolve(reference)
        try:
            header = read_gguf_header(path)
        except (GgufError, OSError):
            # The engine takes the file all the same, or refuses it with its own words: a simulated one reads none.
            return Model(reference, path, None, lambda ctx, slots, backend: None)
        return Model(
            reference,
            path,
            header.context_length or None,
            lambda *figures: _need_bytes(header, *figures),
            lambda ctx: kv_bytes_per_token(header, ctx),
        )


class RemoteLibrary:
    """Models of servers elsewhere, beside those of the library underneath."""

    def __init__(self, servers: Sequence[OpenaiServerSettings], beneath: Library) -> None:
        self._servers = {server.name: server for server in servers}
        self._beneath = beneath

    def is_open(self, reference: str) -> bool:
        """Of those elsewhere, pools serve what the configuration gives them, and no other."""
        return self._beneath.is_open(reference)

    def look(self, reference: str) -> Model:
        if not reference.startswith(SCHEME):
            return self._beneath.look(reference)
        name, _ = split_reference(reference)
        server = self._servers.get(name)
        if server is None:
            known = ", ".join(self._servers) or "none"
            raise ModelNotFound(f"{reference!r}: `engines.openai.servers` has no {name!r}; known: {known}")
        elsewhere = Elsewhere(server.max_concurrency or SLOTS_GUESS, server.ctx or CTX_GUESS, offer_of(server))
        return Model(reference, None, None, lambda ctx, slots, backend: None, elsewhere=elsewhere)


class CatalogLibrary:
    """The catalog's names before those of the library underneath."""

    def __init__(self, book: CatalogBook, beneath: Library, fetched: Path | None = None) -> None:
        self._book = book
        self._beneath = beneath
        self._fetched = fetched  # the folder of files that came from elsewhere

    def is_open(self, reference: str) -> bool:
        return self._beneath.is_open(self._book.source_of(reference))

    def look(self, reference: str) -> Model:
        source = self._book.source_of(reference)
        entry = self._book.find(reference)
        if entry is not None and entry.source == source and entry.file is not None and self._fetched is not None:
            return replace(self._beneath.look(f"file:{self._fetched / entry.file}"), reference=reference)
        if source == reference and (":" not in reference or reference.startswith("sha256:")):
            raise ModelNotFound(f"the catalog has no model {reference!r}; `llama-orch models` lists those that it has")
        return replace(self._beneath.look(source), reference=reference)


def _need_bytes(header: GgufHeader, ctx: int, slots: int, backend: str) -> int | None:
    """What a worker will take. A simulated device stands for a card."""
    try:
        settings = LoadSettings(ctx, slots, backend="cpu" if backend == "cpu" else "cuda")
        return memory_need(header, settings).total_bytes
    except GgufError:
        return None
