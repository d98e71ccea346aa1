"""Contradictions in the configuration's devices, as far as the file alone shows them. What the driver has to say to
them (is there such a card, is it as large as its parts together) comes at the start, from devices.inventory."""

from __future__ import annotations

from collections.abc import Iterator

from llama_orch.contract.config import DeviceSettings


def device_problems(devices: list[DeviceSettings]) -> Iterator[str]:
    """What is wrong with each device, and with devices of one card."""
    yield from _undivided_problems(devices)
    for index, device in enumerate(devices):
        yield from _one_device_problems(f"devices[{index}]", device)


def are_on_one_card(ids: list[str], devices: list[DeviceSettings]) -> bool:
    """Whether two of the devices with these ids are parts of the same card."""
    cards = [device.uuid for device in devices if device.id in ids and device.uuid is not None]
    return len(set(cards)) < len(cards)


def _undivided_problems(devices: list[DeviceSettings]) -> Iterator[str]:
    """A card may be several devices where each of them states its part."""
    for uuid in sorted({device.uuid for device in devices if device.uuid}):
        parts = [device for device in devices if device.uuid == uuid]
        if len(parts) > 1 and any(part.vram_bytes is None for part in parts):
            yield (
                f"devices: the uuid {uuid!r} is given more than once; "
                "give each device of this card its vram_bytes, or name the card once"
            )


def _one_device_problems(where: str, device: DeviceSettings) -> Iterator[str]:
    if device.backend == "cuda" and not device.uuid:
        yield f"{where}.uuid: a cuda device needs the driver's UUID (nvidia-smi -L shows it)"
    if device.backend != "cuda" and device.uuid is not None:
        yield f"{where}.uuid: only a cuda device has one; leave it out"
    if device.backend == "simulated" and device.vram_bytes is None:
        yield f"{where}.vram_bytes: a simulated device needs its size"
