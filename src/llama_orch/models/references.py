"""From a model reference to the file on this machine."""

from __future__ import annotations

from pathlib import Path

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
    if kind != "file":
        raise ModelNotFound(f"{reference!r} is not served by this version; use builtin:tiny or file:PATH")
    try:
        path = Path(rest).expanduser()
        if path.is_file():
            return path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a folder that is closed to us, a name that no file can have
        raise ModelNotFound(f"{reference!r}: {_cause(error)}") from error
    raise ModelNotFound(f"{reference!r}: there is no such file")


def _cause(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)
