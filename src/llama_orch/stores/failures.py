"""A disk or a database that does not do what it should, as the one error that the contract has for it."""

from __future__ import annotations

import errno
import logging
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from llama_orch.errors import StorageUnavailable

log = logging.getLogger("llama_orch.stores")

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
_ADVICE = {
    "is full": "free some space and repeat",
    "cannot be written to": "make the home folder (LLORCH_HOME) writable and repeat",
    "is in use by another process": "repeat shortly",
    "is damaged": "stop the service and restore a backup with `llama-orch restore`",
    "does not answer as it should": "see the service's log",
}


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Failures of the disk come out as StorageUnavailable; what the system said of them, paths included, is for the
    log alone."""
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        problem = _sqlite_problem(error) if isinstance(error, sqlite3.Error) else _os_problem(error)
        log.error("%s %s: %s", what, problem, error)
        raise StorageUnavailable(f"{what} {problem}; {_ADVICE[problem]}") from error


def _os_problem(error: OSError) -> str:
    if error.errno in _FULL:
        return "is full"
    return "cannot be written to" if error.errno in _READ_ONLY else "does not answer as it should"


def _sqlite_problem(error: sqlite3.Error) -> str:
    code = getattr(error, "sqlite_errorcode", None)
    match None if code is None else code & 0xFF:  # the low byte is the kind, the rest says more
        case sqlite3.SQLITE_FULL:
            return "is full"
        case sqlite3.SQLITE_READONLY | sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_PERM:
            return "cannot be written to"
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
            return "is in use by another process"
        case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB:
            return "is damaged"
        case sqlite3.SQLITE_IOERR:
            return "does not answer as it should"
    raise error  # a statement of ours that is wrong is a defect, not the disk's doing
