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
    """The configuration names devices that this machine does not have."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a device's facts come from. `uuid` is what CUDA_VISIBLE_DEVICES takes; several devices may have the same,
    each a part of that card. No reading raises, and none keeps an event loop for longer than devices.nvml.DEADLINE_S,
    once; a card that cannot be read has nothing free."""

    device: Device
    backend: Backend
    uuid: str | None
    read_free_bytes: Callable[[], int]  # at most the device's size; what this service gave away itself is not in it
    read_card: Callable[[], Reading] | None = None  # of a card only: all that the driver says of it

    def read_problem(self) -> str | None:
        """Why nothing may be placed on it now: its card is lost, condemned or cannot be read. None while it is well,
        and always where there is no card."""
        return None if self.read_card is None else self.read_card().error

    def read_process_bytes(self, pid: int) -> int | None:
        """Memory of this process on the card. None where the driver does not tell (an old one, or one outside of our
        container), does not know the process as one that computes on this card, or cannot be read; and without one."""
        by_pid = None if self.read_card is None else self.read_card().process_bytes
        return None if by_pid is None else by_pid.get(pid)

    def read_utilization(self) -> float | None:
        """From 0 to 1, of the whole card; None where nobody measures it or the card cannot be read."""
        return None if self.read_card is None else self.read_card().utilization

    def read_used_bytes(self) -> int | None:
        """Memory that is in use, by whomever, on the whole card; None while the card cannot be read."""
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
        sources = [_declared(one, nvml, watch) for one in settings]
        for card in nvml.cards:
            _check_parts(card, [one for one in settings if one.uuid == card.uuid])
        return sources
    if nvml.cards and can_use_cuda(tuple(card.uuid for card in nvml.cards)):
        return [_on_card(f"gpu{card.index}", card, watch) for card in nvml.cards]
    why = "the installed engines have no CUDA" if nvml.cards else "no NVIDIA card was found"
    log.warning("%s: models run on the CPU", why)
    return [_cpu("cpu")]


def _on_card(device_id: str, card: Card, watch: Watch, name: str | None = None, cap_bytes: int | None = None) -> Source:
    """A card, or as much of it as `cap_bytes`."""
    total = card.vram_total_bytes if cap_bytes is None else min(cap_bytes, card.vram_total_bytes)

    def read_card() -> Reading:
        return watch.reading(card)

    def read_free_bytes() -> int:
        return min(total, read_card().vram_free_bytes)

    device = Device(device_id, name or card.name, "cuda", total, read_free_bytes())
    return Source(device, "cuda", card.uuid, read_free_bytes, read_card)


def _check_parts(card: Card, parts: list[DeviceSettings]) -> None:
    """Devices that share a card are at most the card together: each one counts on its whole size. A single one is only
    a cap, and capped itself."""
    together = sum(part.vram_bytes or card.vram_total_bytes for part in parts)
    if len(parts) > 1 and together > card.vram_total_bytes:
        sizes = " + ".join(f"{part.id} {_mib(part.vram_bytes or card.vram_total_bytes)}" for part in parts)
        raise DeviceError(
            f"card {card.uuid} has {_mib(card.vram_total_bytes)}, less than its devices together ({sizes}): "
            "lower their vram_bytes"
        )


def _mib(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"


def _cpu(device_id: str, name: str | None = None, cap_bytes: int | None = None) -> Source:
    """The CPU with main memory, or with as much of it as `cap_bytes`."""
    total = cpu.memory_total_bytes()
    total = total if cap_bytes is None else min(cap_bytes, total)

    def read_free_bytes() -> int:
        return min(total, cpu.memory_free_bytes())

    return Source(Device(device_id, name or cpu.name(), "cpu", total, read_free_bytes()), "cpu", None, read_free_bytes)


def _declared(settings: DeviceSettings, nvml: Nvml, watch: Watch) -> Source:
    if settings.backend == "cpu":
        return _cpu(settings.id, settings.name, settings.vram_bytes)
    if settings.backend == "simulated":
        total = settings.vram_bytes or 0
        device = Device(settings.id, settings.name or settings.id, "simulated", total, total)
        return Source(device, "simulated", None, lambda: total)
    card = next((card for card in nvml.cards if card.uuid == settings.uuid), None)
    if card is None:
        found = ", ".join(card.uuid for card in nvml.cards) or "none"
        raise DeviceError(f"device {settings.id}: no card with UUID {settings.uuid}; the driver reports: {found}")
    return _on_card(settings.id, card, watch, settings.name, settings.vram_bytes)
