"""One service to a home folder: the lock that it holds for as long as it runs.

The kernel holds the lock for the process, and lets go of it however the process ends. The file stays; what it says is
only who held it last.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager

from llama_orch.settings import Home, SettingsError

_PID_BYTES_MAX = 20


@contextmanager
def hold(home: Home) -> Iterator[None]:
    """Hold the lock of this home folder. SettingsError when another service has it, or when it cannot be had."""
    path = home.path / "lock"
    try:
        # Closed when a worker is started: a lock that a child keeps would outlive a service that was killed.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise SettingsError([f"{path}: {error.strerror}; set LLORCH_HOME to a folder of yours"]) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SettingsError([_refusal(home, descriptor)]) from error
        except OSError as error:
            raise SettingsError([f"{path}: cannot be locked: {error.strerror}"]) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _refusal(home: Home, descriptor: int) -> str:
    pid = os.pread(descriptor, _PID_BYTES_MAX, 0).decode("ascii", "replace").strip()
    # It may not have written its id yet.
    holder = f"another service (process {pid})" if pid.isdecimal() else "another service"
    return f"{holder} runs on the home folder {home.path}: stop it first, or set LLORCH_HOME to another folder"
