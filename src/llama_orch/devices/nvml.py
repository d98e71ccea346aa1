"""NVIDIA cards as the driver reports them. Without a driver there are none, and that is no error."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import pynvml

log = logging.getLogger("llama_orch.devices")


@dataclass(frozen=True, slots=True)
class Card:
    """One card. `index` is NVML's own and means nothing to CUDA; the UUID does."""

    uuid: str
    name: str
    index: int
    vram_total_bytes: int


class Nvml:
    """The driver's library, opened once. `cards` is empty where there is no driver or no card."""

    def __init__(self) -> None:
        self.cards: list[Card] = []
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            log.debug("no NVIDIA driver: %s", error)
            return
        self.cards = [card for index in range(pynvml.nvmlDeviceGetCount()) if (card := _read(index)) is not None]

    def vram_free_bytes(self, card: Card) -> int:
        """Free memory now; 0 when the driver has lost the card, so that nothing is placed on it."""
        try:
            handle = pynvml.nvmlDeviceGetHandleByUUID(card.uuid)
            return int(pynvml.nvmlDeviceGetMemoryInfo(handle).free)
        except pynvml.NVMLError as error:
            log.warning("card %s cannot be read: %s", card.uuid, error)
            return 0


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _read(index: int) -> Card | None:
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        return Card(
            uuid=_text(pynvml.nvmlDeviceGetUUID(handle)),
            name=_text(pynvml.nvmlDeviceGetName(handle)),
            index=index,
            vram_total_bytes=int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
        )
    except pynvml.NVMLError as error:
        log.warning("card %d is left out: %s", index, error)
        return None
