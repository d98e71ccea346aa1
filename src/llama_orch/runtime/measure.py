"""What a loaded replica really takes of its devices, as the driver or else its engine says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from llama_orch.devices.inventory import Source
from llama_orch.engines.base import WorkerFacts
from llama_orch.models.memory import CUDA_CONTEXT_BYTES

# Of the forecast: a difference beyond these is somebody else's doing.
DIFFERENCE_MIN, DIFFERENCE_MAX = 0.5, 1.5


def process_tree(pid: int) -> Iterator[int]:
    """The process and all below it, as far as they can be seen; a wrapper's child is who uses the card."""
    yield pid
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # it has just ended
        return
    for child in children:
        yield from process_tree(int(child))


class Differences:
    """What a card's used memory rose by while one replica, and no other, was loaded on it: the measure of last resort
    where a driver does not tell memory by process. Another program's doings in that time would be taken for the
    replica's, so only what is near the forecast counts."""

    def __init__(self) -> None:
        self._changes: dict[str, int] = {}  # loads and ends on a device, counted
        self._loading: dict[str, set[str]] = {}  # replicas, by device
        self._before: dict[tuple[str, str], tuple[int, int]] = {}  # replica, device -> changes, bytes in use

    def begin(self, replica_id: str, mask: Sequence[Source]) -> None:
        """The replica begins to load. Beside another load on the device neither can be told from the other."""
        for source in mask:
            device_id = source.device.device_id
            self._change(device_id)
            loading = self._loading.setdefault(device_id, set())
            used = source.read_used_bytes() if source.backend == "cuda" and not loading else None
            loading.add(replica_id)
            if used is not None:
                self._before[replica_id, device_id] = self._changes[device_id], used

    def end(self, replica_id: str, device_ids: Iterable[str]) -> None:
        """The replica's worker is gone, or its load has failed."""
        for device_id in device_ids:
            self._change(device_id)
            self._loading.get(device_id, set()).discard(replica_id)
            self._before.pop((replica_id, device_id), None)

    def _change(self, device_id: str) -> None:
        self._changes[device_id] = self._changes.get(device_id, 0) + 1

    def of(self, replica_id: str, source: Source, predicted: int) -> int | None:
        """It has been loaded: what it took, as far as that can be told."""
        device_id = source.device.device_id
        changes, before = self._before.pop((replica_id, device_id), (-1, 0))
        used = source.read_used_bytes()
        if used is None or changes != self._changes.get(device_id):
            return None
        rise = used - before
        return rise if DIFFERENCE_MIN * predicted <= rise <= DIFFERENCE_MAX * predicted else None

    def loaded(self, replica_id: str, device_ids: Iterable[str]) -> None:
        """Its load is over, and what it took was asked for."""
        for device_id in device_ids:
            self._change(device_id)
            self._loading.get(device_id, set()).discard(replica_id)


def measured_bytes(
    mask: Sequence[Source], facts: WorkerFacts, difference: Callable[[Source], int | None]
) -> dict[str, int]:
    """Bytes by device; a device that nothing is known of is left out. What runs on a simulated device takes main
    memory, which says nothing of the card that it stands for."""
    pids = [] if facts.pid is None else list(process_tree(facts.pid))
    found: dict[str, int | None] = {}
    for number, source in enumerate(mask):
        if source.backend == "cuda":
            told = _told_by_driver(source, pids) or difference(source)
            found[source.device.device_id] = told or _told_by_engine(number, facts.buffer_bytes)
        elif source.backend == "cpu":
            found[source.device.device_id] = sum(facts.buffer_bytes.values())
    return {device_id: count for device_id, count in found.items() if count}


def _told_by_driver(source: Source, pids: Sequence[int]) -> int:
    return sum(count for pid in pids if (count := source.read_process_bytes(pid)) is not None)


def _told_by_engine(number: int, buffer_bytes: Mapping[str, int]) -> int:
    """Its buffers, with what a process takes beside them. `number`: the card's place among those that it sees."""
    buffers = sum(count for name, count in buffer_bytes.items() if name.startswith(f"CUDA{number}/"))
    return buffers + CUDA_CONTEXT_BYTES if buffers else 0
