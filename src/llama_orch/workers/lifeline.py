"""The duties that every worker has towards the service that started it.

stdin: one JSON line of configuration, then silence; its end means that the service is gone or wants the worker gone.
stdout: one JSON line, `{"ready": true, …}` once the model is loaded or `{"ready": false, "error": …}`; then closed.
stderr: the engine's log, line by line.

Three things end a worker whose service died, whatever state it is in: the kernel's parent-death signal, the end of
stdin, and the comparison of the parent's process id at the start (for a service that died before the signal was set).
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn

_PR_SET_PDEATHSIG = 1
_CONFIGURATION_BYTES_MAX = 4 << 20  # it may hold a chat template

# Loaded here and not where it is used, which is between fork and exec in a wrapper.
_libc = ctypes.CDLL(None, use_errno=True)


class Lifeline:
    """The worker's side of the protocol. Make it first thing in `main`, before anything can print."""

    def __init__(self) -> None:
        die_with_parent()
        os.umask(0o077)
        # No core dumps: a worker's memory holds prompts and its key.
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        # Libraries print to descriptor 1 as they like; the one line that matters leaves through a copy of it.
        self._ready_fd = os.dup(1)
        os.dup2(2, 1)
        self._on_end: Callable[[], None] = _nothing
        self.configuration = self._read_configuration()

    def on_end(self, action: Callable[[], None]) -> None:
        """Run `action` before the process leaves because stdin ended (a wrapper kills its child there)."""
        self._on_end = action

    def watch(self) -> None:
        """Watch stdin from now on, also while the model loads, so that a load can be interrupted."""
        threading.Thread(target=self._exit_at_end_of_stdin, name="lifeline", daemon=True).start()

    def ready(self, **facts: object) -> None:
        """Tell the service that the model is loaded."""
        self._report({"ready": True, **facts})

    def fail(self, error: str) -> NoReturn:
        """Tell the service why the model cannot be loaded, and leave."""
        self._report({"ready": False, "error": error})
        sys.stderr.flush()
        os._exit(1)

    def _report(self, line: dict[str, object]) -> None:
        os.write(self._ready_fd, json.dumps(line).encode() + b"\n")
        os.close(self._ready_fd)

    def _read_configuration(self) -> dict[str, Any]:
        line = sys.stdin.buffer.readline(_CONFIGURATION_BYTES_MAX)
        if not line.endswith(b"\n"):
            os._exit(1)  # the service died, or is not our service
        configuration: dict[str, Any] = json.loads(line)
        if os.getppid() != configuration["parent_pid"]:
            os._exit(1)
        return configuration

    def _exit_at_end_of_stdin(self) -> NoReturn:
        while sys.stdin.buffer.read(1):
            pass
        self._on_end()
        # Not sys.exit: an engine's threads and destructors could hold the process (and its GPU memory) for seconds.
        os._exit(0)


def run(main: Callable[[Lifeline], object]) -> NoReturn:
    """Run a worker: `main` loads the model, calls `ready` and returns what must stay alive while threads serve.

    Whatever it raises is reported as a failed load.
    """
    lifeline = Lifeline()
    lifeline.watch()
    try:
        served = main(lifeline)
    except Exception as error:  # noqa: BLE001 - the border of the process
        lifeline.fail(f"{type(error).__name__}: {error}")
    while served is not lifeline:  # always: `served` is only kept alive here
        threading.Event().wait()
    lifeline.fail("a worker's main returned its own lifeline")


def die_with_parent(parent_pid: int | None = None) -> None:
    """Have the kernel kill this process when the thread that forked it ends (prctl(2), PR_SET_PDEATHSIG). With
    `parent_pid`, leave at once if the parent is another process already."""
    if _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if parent_pid is not None and os.getppid() != parent_pid:
        os._exit(1)


def _nothing() -> None:
    pass
