"""From a model reference to the file on this machine."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from llama_orch.policy.urls import without_query

BUILTIN = {"tiny": Path(__file__).parent / "tiny.gguf"}


class ModelNotFound(Exception):
    """The reference leads to no file; the text says why."""


def resolve(reference: str) -> Path:
    """The file that `builtin:NAME` or `file:PATH` stands for. It exists and is a regular file."""
    kind, _, rest = reference.partition(":")
    if kind == "builtin":
        if rest not in BUILTIN:
            raise ModelNotFound(f"there is no {reference!r}; built in: {', '.join(BUILTIN)}")
        return BUILTIN[rest]
    if kind in ("hf", "https"):
        told = without_query(reference)
        raise ModelNotFound(f"{told!r} has to be fetched first: enter it into the catalog and fetch it from there")
    if kind != "file":
        raise ModelNotFound(f"{reference!r} is not served by this version; use builtin:tiny or file:PATH")
    try:
        path = Path(rest).expanduser()
        if path.is_file():
            return path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a folder that is closed to us, a name that no file can have
        raise ModelNotFound(f"{reference!r}: {_cause(error)}") from error
    raise ModelNotFound(f"{reference!r}: there is no such file")


class FileRoots:
    """The folders of `catalog.file_roots`: whoever has the token may name the files below them, and no others."""

    def __init__(self, roots: Iterable[str]) -> None:
        self._roots = [Path(root).expanduser().resolve() for root in roots]

    def admit(self, path: Path) -> bool:
        """Links are followed first. Whether there is such a file is not looked at, nor told."""
        try:
            return path.is_absolute() and any(path.resolve().is_relative_to(root) for root in self._roots)
        except (OSError, RuntimeError, ValueError):  # a loop of links, or a name that no file can have
            return False


def _cause(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)
