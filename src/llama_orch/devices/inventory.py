"""The devices of this installation: discovered or declared, with what is free on each."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from llama_orch.clock import Clock
from llama_orch.contract.config import DeviceSettings
from llama_orch.core.ledger import Device
from llama_orch.devices import cpu
from llama_orch.devices.nvml import Card, Nvml, Reading, Watch

log = logging.getLogger("llama_orch.devices")

Backend = Literal["cuda", "cpu", "simulated"]


class DeviceError(Exception):
    """The configuration names a device that this machine does not have."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a device's facts come from. `uuid` is what CUDA_VISIBLE_DEVICES takes. No reading raises, and none keeps an
    event loop for longer than devices.nvml.DEADLINE_S, once; a card that cannot be read has nothing free."""

    device: Device
    backend: Backend
    uuid: str | None
    read_free_bytes: Callable[[], int]
    read_card: Callable[[], Reading] | None = None  # of a card only: all that the driver says of it

    def read_utilization(self) -> float | None:
        """From 0 to 1; None where nobody measures it or the card cannot be read."""
        return None if self.read_card is None else self.read_card().utilization

    def read_used_bytes(self) -> int | None:
        """Memory that is in use, by whomever; None while the card cannot be read."""
        if self.read_card is None:
            return max(0, self.device.vram_total_bytes - self.read_free_bytes())
        return self.read_card().vram_used_bytes


def discover(
    settings: list[DeviceSettings] | Literal["auto"],
    can_use_cuda: Callable[[tuple[str, ...]], bool],
    clock: Clock | None = None,
) -> list[Source]:
    """The devices to place replicas on. `can_use_cuda` says whether the engines here were built for the cards of these
    UUIDs; it is asked only when there are any. Opening the driver may take seconds: not for an event loop."""
    nvml = Nvml(clock)
    watch = Watch(nvml, clock)
    if settings != "auto":
        return [_declared(one, nvml, watch) for one in settings]
    if nvml.cards and can_use_cuda(tuple(card.uuid for card in nvml.cards)):
        return [_card(f"gpu{card.index}", card, watch) for card in nvml.cards]
    why = "the installed engines have no CUDA" if nvml.cards else "no NVIDIA card was found"
    log.warning("%s: models run on the CPU", why)
    return [_cpu("cpu", None)]


def _card(device_id: str, card: Card, watch: Watch, name: str | None = None) -> Source:
    free = watch.reading(card).vram_free_bytes
    device = Device(device_id, name or card.name, "cuda", card.vram_total_bytes, free)
    return Source(
        device, "cuda", card.uuid, lambda: watch.reading(card).vram_free_bytes, read_card=lambda: watch.reading(card)
    )


def _cpu(device_id: str, name: str | None) -> Source:
    device = Device(device_id, name or cpu.name(), "cpu", cpu.memory_total_bytes(), cpu.memory_free_bytes())
    return Source(device, "cpu", None, cpu.memory_free_bytes)


def _declared(settings: DeviceSettings, nvml: Nvml, watch: Watch) -> Source:
    if settings.backend == "cpu":
        return _cpu(settings.id, settings.name)
    if settings.backend == "simulated":
        total = settings.vram_bytes or 0
        device = Device(settings.id, settings.name or settings.id, "simulated", total, total)
        return Source(device, "simulated", None, lambda: total)
    card = next((card for card in nvml.cards if card.uuid == settings.uuid), None)
    if card is None:
        found = ", ".join(card.uuid for card in nvml.cards) or "none"
        raise DeviceError(f"device {settings.id}: no card with UUID {settings.uuid}; the driver reports: {found}")
    return _card(settings.id, card, watch, settings.name)
