"""Which replica a task runs on: filter, score, pick (HP-PLC-1). Plain functions over what is there now."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from llama_orch.core.pool import Device, Replica


@dataclass(frozen=True, slots=True)
class Candidate:
    """A replica that could take the task, with what the choice looks at."""

    replica: Replica
    vram_free_bytes: int  # of its scarcest device
    slots_busy: int

    @property
    def rank(self) -> tuple[int, int, str]:
        """Most free VRAM, then fewest busy slots, then replica id."""
        return (-self.vram_free_bytes, self.slots_busy, self.replica.replica_id)


def candidates(replicas: Iterable[Replica], devices: Mapping[str, Device], *, exclusive: bool) -> list[Candidate]:
    """The replicas that could start the task now."""
    return [
        Candidate(replica, min(devices[d].vram_free_bytes for d in replica.device_ids), replica.slots_busy)
        for replica in replicas
        if replica.can_take(exclusive=exclusive)
    ]


def pick(found: list[Candidate]) -> Candidate | None:
    return min(found, key=lambda candidate: candidate.rank, default=None)


def reasons(chosen: Candidate, found: list[Candidate]) -> str:
    """Why this replica, for the task and the log."""
    figures = "; ".join(
        f"{c.replica.replica_id}: {c.vram_free_bytes / 2**20:.0f} MiB free, {c.slots_busy}/{c.replica.slots} slots busy"
        for c in sorted(found, key=lambda c: c.rank)
    )
    return f"{chosen.replica.replica_id} chosen of {len(found)} ({figures})"
