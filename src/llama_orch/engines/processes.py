"""Processes as the kernel tells of them: who has a process id, what runs in a session, and the end of all of it.

A process id alone names nobody, because it is given out again. With the time of its start it names one process of one
boot, and only such a name may be killed by somebody who is not its parent.
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec


class ProcessIdentity(msgspec.Struct, frozen=True):
    """One process of this boot. `started` is in clock ticks since the boot (field 22 of /proc/PID/stat)."""

    pid: int
    started: int


@dataclass(frozen=True, slots=True)
class ProcessFacts:
    """What /proc/PID/stat says of a process, as far as it matters here."""

    identity: ProcessIdentity
    session: int
    has_ended: bool  # it only waits for its parent to read how


def facts_of(pid: int) -> ProcessFacts | None:
    """The process that has this id now; None when none has, or one that we may not look at."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    # After the last ")" come the fields from the third on; the name before it may hold anything.
    fields = stat.rpartition(b")")[2].split()
    return ProcessFacts(ProcessIdentity(pid, int(fields[19])), session=int(fields[3]), has_ended=fields[0] in b"ZX")


def boot_id() -> str:
    """Differs from boot to boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def is_running(identity: ProcessIdentity) -> bool:
    """Whether this very process runs, and not another one that got its id."""
    facts = facts_of(identity.pid)
    return facts is not None and facts.identity == identity and not facts.has_ended


def session_members(session_id: int) -> list[int]:
    """The live processes of a session whose leader is gone; empty while a process with the leader's id exists, for then
    the id belongs to somebody else."""
    members = [facts.identity.pid for facts in _running_in(session_id)]
    return [] if session_id in members else members


def end_session(leader: ProcessIdentity, limit_s: float) -> int:
    """SIGKILL everything in the session of this leader and wait until it is gone; returns how many processes that were.
    TimeoutError when some do not end.

    Nothing is touched when the id has another process by now, or one that leads no session, or none at all: what else
    is in the session could then not be told from a later session of the same number.
    """
    facts = facts_of(leader.pid)
    if facts is None or facts.identity != leader or facts.session != leader.pid:
        return 0
    deadline = time.monotonic() + limit_s
    ended: set[ProcessIdentity] = set()
    # Once more after each round: a process may have forked before its end.
    while members := [member.identity for member in _running_in(leader.pid)]:
        holder = facts_of(leader.pid)
        if holder is not None and holder.identity != leader:
            break
        if time.monotonic() >= deadline:
            raise TimeoutError(f"process {members[0].pid} does not end, not even by SIGKILL")
        _kill(members, deadline)
        ended.update(members)
    return len(ended)


def _running_in(session_id: int) -> Iterator[ProcessFacts]:
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            facts = facts_of(int(entry))
            if facts is not None and facts.session == session_id and not facts.has_ended:
                yield facts


def _kill(processes: list[ProcessIdentity], deadline: float) -> None:
    """SIGKILL all of them, then wait for their ends."""
    with ExitStack() as pins:
        ends = select.poll()
        pinned = 0
        for process in processes:
            with suppress(ProcessLookupError):
                pin = os.pidfd_open(process.pid)
                pins.callback(os.close, pin)
                if is_running(process):  # so the descriptor means this one, whatever its id comes to mean
                    signal.pidfd_send_signal(pin, signal.SIGKILL)
                    ends.register(pin, select.POLLIN)
                    pinned += 1
        while pinned and time.monotonic() < deadline:
            for pin, _ in ends.poll(max(0.0, deadline - time.monotonic()) * 1000):
                ends.unregister(pin)
                pinned -= 1
