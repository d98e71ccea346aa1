"""The 0700 folder that holds one worker's socket, and the sweep of those that a killed service left behind.

A Unix socket's path is limited to 107 bytes, so the folder's own path is short. Its name carries the service's process
id, which is how the sweep knows the dead from the living.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import tempfile
from pathlib import Path

_PREFIX = "llorch-"
_SOCKET_PATH_BYTES_MAX = 107
_NAME_BYTES = 40  # what is added to the base: our folder's name and the longest file name in it
_NAME = re.compile(rf"{_PREFIX}(\d+)-\w+")


def make_private_folder() -> Path:
    """A fresh folder that only this user can enter, short enough for a socket."""
    for base in _bases():
        if len(os.fsencode(base)) + _NAME_BYTES <= _SOCKET_PATH_BYTES_MAX and os.access(base, os.W_OK | os.X_OK):
            return Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=base))
    raise OSError("no writable folder with a path short enough for a Unix socket: set XDG_RUNTIME_DIR or TMPDIR")


def remove_private_folder(folder: Path) -> None:
    """Remove the folder and what is in it; one that is gone already is fine."""
    shutil.rmtree(folder, ignore_errors=True)


def sweep_private_folders() -> int:
    """Remove the folders of services that no longer run, owned by this user; returns how many."""
    removed = 0
    for base in _bases():
        for folder in Path(base).glob(f"{_PREFIX}*"):
            name = _NAME.fullmatch(folder.name)
            if name and _is_our_folder(folder) and not Path(f"/proc/{name[1]}").exists():
                remove_private_folder(folder)
                removed += 1
    return removed


def _bases() -> list[str]:
    return [base for base in (os.environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir(), "/tmp") if base]


def _is_our_folder(folder: Path) -> bool:
    try:
        entry = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(entry.st_mode) and entry.st_uid == os.getuid()
