"""What a loaded replica really takes of its devices, as the driver or else its engine says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from llama_orch.devices.inventory import Source
from llama_orch.engines.base import WorkerFacts
from llama_orch.models.memory import CUDA_CONTEXT_BYTES


def process_tree(pid: int) -> Iterator[int]:
    """The process and all below it, as far as they can be seen; a wrapper's child is who uses the card."""
    yield pid
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # it has just ended
        return
    for child in children:
        yield from process_tree(int(child))


def measured_bytes(mask: Sequence[Source], facts: WorkerFacts) -> dict[str, int]:
    """Bytes by device; a device that nothing is known of is left out. What runs on a simulated device takes main
    memory, which says nothing of the card that it stands for."""
    pids = [] if facts.pid is None else list(process_tree(facts.pid))
    found = {
        source.device.device_id: on_card(source, number, pids, facts.buffer_bytes)
        for number, source in enumerate(mask)
        if source.backend == "cuda"
    }
    found |= {s.device.device_id: sum(facts.buffer_bytes.values()) for s in mask if s.backend == "cpu"}
    return {device_id: count for device_id, count in found.items() if count}


def on_card(source: Source, number: int, pids: Sequence[int], buffer_bytes: Mapping[str, int]) -> int | None:
    """By the driver's word for the processes, else the engine's for its buffers with what a process takes beside them.
    `number`: the card's place among those that the worker sees."""
    told = [count for pid in pids if (count := source.read_process_bytes(pid)) is not None]
    if told:
        return sum(told)
    buffers = sum(count for name, count in buffer_bytes.items() if name.startswith(f"CUDA{number}/"))
    return buffers + CUDA_CONTEXT_BYTES if buffers else None
