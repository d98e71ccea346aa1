"""The 0700 folder that holds one worker's socket, and the sweep of what a killed service left behind.

A Unix socket's path is limited to 107 bytes, so the folder's own path is short. A record in it says which service owns
it and which worker lives in it, each by process id, time of start and boot, so that the sweep never takes a process
that got an old id for the one that had it before.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import stat
import tempfile
from pathlib import Path

import msgspec

from llama_orch.engines.processes import ProcessIdentity, boot_id, end_session, facts_of, is_running

log = logging.getLogger("llama_orch.engines")

_PREFIX = "llorch-"
_SOCKET_PATH_BYTES_MAX = 107
_NAME_BYTES = 40  # what is added to the base: our folder's name and the longest name of a socket in it
_NAME = re.compile(rf"{_PREFIX}(\d+)-\w+")
_RECORD = "owner.json"
_RECORD_BYTES_MAX = 4096
_KILL_WAIT_S = 5.0


class _Record(msgspec.Struct):
    """Who owns a folder, and who lives in it."""

    boot_id: str
    service: ProcessIdentity
    worker: ProcessIdentity | None = None


def make_private_folder() -> Path:
    """A fresh folder that only this user can enter, short enough for a socket, with this process as its owner."""
    for base in _bases():
        if len(os.fsencode(base)) + _NAME_BYTES <= _SOCKET_PATH_BYTES_MAX and os.access(base, os.W_OK | os.X_OK):
            folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=base))
            try:
                _write_record(folder, worker=None)
            except BaseException:
                remove_private_folder(folder)
                raise
            return folder
    raise OSError("no writable folder with a path short enough for a Unix socket: set XDG_RUNTIME_DIR or TMPDIR")


def record_worker(folder: Path, pid: int) -> None:
    """Say that this process, a child of ours, lives in the folder. One that has ended already leaves no record."""
    facts = facts_of(pid)
    if facts is not None:
        _write_record(folder, facts.identity)


def remove_private_folder(folder: Path) -> None:
    """Remove the folder and what is in it; one that is gone already is fine."""
    shutil.rmtree(folder, ignore_errors=True)


def sweep_private_folders() -> int:
    """End the workers and remove the folders of services that no longer run, owned by this user; returns how many
    folders. What cannot be ended or judged stays, with a line in the log."""
    removed = 0
    for base in _bases():
        for folder in Path(base).glob(f"{_PREFIX}*"):
            name = _NAME.fullmatch(folder.name)
            if name is None or not _is_our_folder(folder):
                continue
            try:
                if _is_abandoned(folder, int(name[1])):
                    remove_private_folder(folder)
                    removed += 1
            except OSError as error:
                log.warning("the folder %s of an earlier service stays: %s", folder, error)
    return removed


def _bases() -> list[str]:
    bases = (os.environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir(), "/tmp")
    return list(dict.fromkeys(base for base in bases if base))


def _is_our_folder(folder: Path) -> bool:
    try:
        entry = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(entry.st_mode) and entry.st_uid == os.getuid()


def _is_abandoned(folder: Path, named_pid: int) -> bool:
    """Whether nobody owns the folder and nobody lives in it, the latter by force if need be."""
    record = _read_record(folder)
    if record is None:
        # Made a moment ago and not recorded yet, or damaged: then the name tells, and any process of that id counts.
        owner = facts_of(named_pid)
        return owner is None or owner.has_ended
    if record.boot_id != boot_id():
        return True
    if is_running(record.service):
        return False
    if record.worker is not None and (ended := end_session(record.worker, _KILL_WAIT_S)):
        log.warning("process %d outlived its service: ended, %d processes in all", record.worker.pid, ended)
    return True


def _read_record(folder: Path) -> _Record | None:
    """The folder's record; None without one that can be used, for whatever reason."""
    try:
        descriptor = os.open(folder / _RECORD, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            return msgspec.json.decode(file.read(_RECORD_BYTES_MAX), type=_Record)
    except (OSError, msgspec.DecodeError):
        return None


def _write_record(folder: Path, worker: ProcessIdentity | None) -> None:
    """Replace the record as a whole: a sweep must not read half of it."""
    service = facts_of(os.getpid())
    if service is None:
        raise OSError("/proc does not tell of this process")
    draft = folder / f"{_RECORD}.new"
    draft.write_bytes(msgspec.json.encode(_Record(boot_id(), service.identity, worker)))
    draft.replace(folder / _RECORD)
