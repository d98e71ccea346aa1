"""Which replicas fit their devices, judged from the model file before anything is started (HP-PLC-5).

The ledger counts what this start has already given away on a device, so that replicas do not count on the same memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llama_orch.contract.config import PoolSettings
from llama_orch.devices.inventory import Source
from llama_orch.models.gguf import GgufError, read_gguf_header
from llama_orch.models.memory import LoadSettings, memory_need

RESERVE_BYTES = 256 * 2**20  # of every device, for what else needs a little of it


class Ledger:
    """Bytes promised to replicas, by device."""

    def __init__(self) -> None:
        self._promised: dict[str, int] = {}

    def free_bytes(self, source: Source) -> int:
        device = source.device
        return device.vram_free_bytes - RESERVE_BYTES - self._promised.get(device.device_id, 0)

    def claim(self, mask: Sequence[Source], pool: PoolSettings, path: Path, slots: int) -> str | None:
        """Promise one replica of the pool its memory; else why it does not fit, with the figures."""
        need = need_bytes(path, pool.ctx, slots, mask[0].backend)
        if need is None:
            return None
        shares = pool.tensor_split or [1.0] * len(mask)
        parts = [round(need * share / sum(shares)) for share in shares]
        for source, part in zip(mask, parts, strict=True):
            if part > self.free_bytes(source):
                return (
                    f"{pool.model} with {slots} slots of {pool.ctx} tokens needs {_mib(part)} on device "
                    f"{source.device.device_id}, which has {_mib(max(0, self.free_bytes(source)))} to give; use a "
                    "smaller model, fewer slots or less ctx"
                )
        for source, part in zip(mask, parts, strict=True):
            device_id = source.device.device_id
            self._promised[device_id] = self._promised.get(device_id, 0) + part
        return None


def need_bytes(path: Path, ctx: int, slots: int, backend: str) -> int | None:
    """What a worker will take, in bytes; None for a file without a header that could tell. A simulated device stands
    for a card."""
    try:
        header = read_gguf_header(path)
        return memory_need(header, LoadSettings(ctx, slots, backend="cpu" if backend == "cpu" else "cuda")).total_bytes
    except GgufError:
        return None


def _mib(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"
